"""What the environment says about a run: variables, then accelerate's default file."""

from collections.abc import Mapping
from pathlib import Path

from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json
from simpletuner.config.files import parse
from simpletuner.config.findings import Findings

VARIABLES = {"MIXED_PRECISION": "mixed_precision", "TRAINING_DYNAMO_BACKEND": "dynamo_backend"}
"""Environment variable -> the key that it stands for."""


def fill_from_environment(
    flat: dict[str, Json], labels: Mapping[str, str], environ: Mapping[str, str], findings: Findings
) -> None:
    """Adds the values of the environment where the user wrote none, and says which value won.

    Args:
        flat: The values written in the file and on the command line; it is added to.
        labels: Key -> where its value was written.
        environ: The environment.
        findings: Takes a notice for each value used or overruled.
    """
    variables = {
        f"{name}={environ[name]}": (key, environ[name]) for name, key in VARIABLES.items() if environ.get(name)
    }
    file = accelerate_file(environ)
    defaults = _accelerate_values(file, findings) if file else {}
    from_file = {f"{file} ({key}: {value})": (key, value) for key, value in defaults.items()}
    won: dict[str, str] = {key: labels.get(key, "the config") for key in flat}
    for source, (key, value) in {**variables, **from_file}.items():
        if key not in won:
            won[key] = source
            flat[key] = value.strip().lower()
            findings.notices.append(f"{key}: {flat[key]}, from {source}")
        elif str(flat[key]).lower() != value.strip().lower():
            findings.notices.append(f"{key}: {flat[key]}, from {won[key]}, which goes before {source}")


def accelerate_file(environ: Mapping[str, str]) -> Path | None:
    """Returns accelerate's config file: the one that is named, or its default file where that exists."""
    named = environ.get("ACCELERATE_CONFIG_PATH")
    if named:
        return Path(named).expanduser()
    if environ.get("HF_HOME"):
        home = Path(environ["HF_HOME"]).expanduser()
    elif environ.get("XDG_CACHE_HOME"):
        home = Path(environ["XDG_CACHE_HOME"]).expanduser() / "huggingface"
    elif environ.get("HOME"):
        home = Path(environ["HOME"]) / ".cache" / "huggingface"
    else:
        return None
    files = (home / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json"))
    return next((file for file in files if file.is_file()), None)


def _accelerate_values(file: Path, findings: Findings) -> dict[str, str]:
    """Returns mixed_precision and dynamo_backend as accelerate's file has them."""
    try:
        content = parse_accelerate(file)
    except UserError as error:
        findings.problems.extend(error.lines)
        return {}
    if not isinstance(content, dict):
        return {}
    dynamo = content.get("dynamo_config")
    backend = dynamo.get("dynamo_backend") if isinstance(dynamo, dict) else None
    found = {"mixed_precision": content.get("mixed_precision"), "dynamo_backend": backend}
    # YAML reads a bare `no` as false.
    return {key: "no" if value is False else str(value) for key, value in found.items() if value is not None}


def parse_accelerate(file: Path) -> Json:
    """Returns the content of accelerate's config file.

    Raises:
        UserError: The file cannot be read or is malformed.
    """
    if file.suffix == ".json":
        return parse(file)
    import yaml  # only here: most machines have no such file

    try:
        return yaml.safe_load(file.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: accelerate's config cannot be read: {' '.join(str(error).split())}") from error
