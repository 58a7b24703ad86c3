"""From a folder of files to batches of cached features.

scan -> Manifest, read_captions -> Manifest, assign -> buckets, precompute -> Cache, CachedDataset -> batches.
"""
