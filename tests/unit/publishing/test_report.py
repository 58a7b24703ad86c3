"""The page of a run: whole within one file, whatever prompts, names and settings say; looked at in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.publishing.report import (
    BucketPictures,
    Curve,
    PictureRow,
    Report,
    code_of,
    curves_of,
    markdown_table,
    pictures_of,
    report_html,
    thumbnail_uri,
    write_report,
)

HOSTILE = """</script><img src=x onerror="alert('1')">{{ 7 * 7 }} & "quoted" \u2028"""
CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), ""
)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    for name in ("base", "step-000002", "step-000004"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (640, 480), (200, 30, int(name[-1], 36) * 5)).save(tmp_path / name / "a.png")
    moments, pictures = pictures_of(tmp_path, {"a.png": HOSTILE, "b.png": "never drawn"}, {"base": HOSTILE})
    rows = [{"step": n, "loss": 1.0 / n, "learning_rate": 1e-4, "data_wait": 0.0} for n in range(1, 40)]
    steps, curves = curves_of(rows)
    return Report(
        title=HOSTILE,
        status=[("Step", "4 of 4")],
        warnings=[HOSTILE],
        plan=[("base model", HOSTILE)],
        steps=steps,
        curves=curves,
        moments=moments,
        pictures=pictures,
        buckets=[BucketPictures("d, 64x64", 3, [(HOSTILE, thumbnail_uri((tmp_path / "base" / "a.png").read_bytes()))])],
        tables=[("Judged", [["", "all right"], [HOSTILE, "93.0 %"]])],
        code=f"print({HOSTILE!r})",
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_nothing_that_is_said_becomes_markup_and_nothing_comes_from_elsewhere(report: Report) -> None:
    page = report_html(report)
    parser = Tags()
    parser.feed(page)
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    assert len(images) == 3  # of the base model, of a moment, of a bucket
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert all(image["alt"] for image in images)
    assert not [attributes for _, attributes in parser.tags if "onerror" in attributes]
    sources = [value for _, attributes in parser.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(str(value).startswith("data:") for value in sources)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.count("</script>") == 3  # the library, the numbers, ours
    assert "&lt;/script&gt;&lt;img src=x" in page
    assert "{{ 7 * 7 }}" in page  # it is no template either


def test_what_is_wrong_is_no_number_and_what_is_long_is_thinned_out() -> None:
    rows: list[dict[str, Any]] = [{"step": n, "loss": float("nan") if n == 3 else 2.0} for n in range(5000)]
    steps, (curve,) = curves_of(rows)
    assert (len(steps), steps[1], steps[-1]) == (1001, 5, 4999)
    assert curve.values[1][-1] == pytest.approx(2.0)  # the average of what is the same is the same
    steps, (curve,) = curves_of(rows[:5])
    assert curve.values == [[2.0, 2.0, 2.0, None, 2.0]]
    assert curve.last == "2"
    assert Curve("loss", [[None]]).last == "none"
    steps, (first, second) = curves_of([{"step": 1, "student/loss": 1.0, "critic/loss": 3.0}])
    assert (first.name, second.name) == ("student: loss", "critic: loss")


def test_many_moments_are_thinned_out_to_the_first_and_the_last(tmp_path: Path) -> None:
    for step in range(40):
        (tmp_path / f"step-{step:06d}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"step-{step:06d}" / "a.png")
    moments, (row,) = pictures_of(tmp_path, {"a.png": "a"}, {})
    assert (len(moments), moments[0], moments[-1]) == (12, "step-000000", "step-000039")
    assert len(row.moving) == 12


def test_many_prompts_are_shown_at_fewer_moments_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(12):
        (tmp_path / f"step-{step:06d}").mkdir()
        for number in range(60):
            Image.new("RGB", (8, 8)).save(tmp_path / f"step-{step:06d}" / f"{number}.png")
    requests = {f"{number}.png": str(number) for number in range(60)}
    moments, rows = pictures_of(tmp_path, requests, {})
    assert (len(moments), len(rows)) == (4, 60)
    monkeypatch.setattr("simpletuner.publishing.report.Image.open", lambda _: pytest.fail("it was read again"))
    assert pictures_of(tmp_path, requests, {}) == (moments, rows)


def test_an_image_of_a_bucket_is_shown_as_it_is_trained_on() -> None:
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    Image.new("RGBA", (80, 40)).save(buffer, "PNG", exif=exif.tobytes())
    shown = Image.open(io.BytesIO(base64.b64decode(thumbnail_uri(buffer.getvalue()).partition(",")[2])))
    assert shown.size == (40, 80)
    assert shown.getpixel((20, 40)) == (255, 255, 255)


def test_tables_and_code_are_found() -> None:
    assert markdown_table("a\n| | x |\n|---|---:|\n| y | 1 |\n\n- z") == [["", "x"], ["y", "1"]]
    assert code_of("# t\n```python\nimport x\n```\n```python\ny\n```") == "import x"
    assert code_of("nothing") == ""


def test_a_page_without_anything_yet() -> None:
    page = report_html(Report("t", [], [], [], [], [], [], [], [], [], ""))
    assert "Pictures" not in page
    assert "Curves" not in page


PROBE = """
<script>
addEventListener("error", (event) => document.body.dataset.error = event.message);
addEventListener("load", () => {
  const moment = document.getElementById("moment"), image = document.querySelector("img[data-row]");
  const before = image.src;
  moment.value = 0;
  moment.dispatchEvent(new Event("input"));
  const label = document.getElementById("moment-label").textContent;
  document.body.dataset.moved = `${image.src !== before} ${label}`;
  document.body.dataset.charts = document.querySelectorAll(".u-wrap canvas").length;
  document.body.dataset.wide = String(document.documentElement.scrollWidth > innerWidth);
  const ground = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  document.body.dataset.themed = String(getComputedStyle(document.body).backgroundColor !== ground);
  const reached = [...document.querySelectorAll("button, input, summary, a[href], [tabindex]")].filter((element) => {
    element.focus();
    const named = element.textContent.trim() || element.ariaLabel || element.labels?.length;
    return document.activeElement === element && named && getComputedStyle(element).outlineStyle !== "none";
  });
  document.body.dataset.keys = reached.map((element) => element.id).filter(Boolean).join(" ");
  document.getElementById("copy").click();
  setTimeout(() => document.body.dataset.copied = document.getElementById("copied").textContent, 500);
});
</script></head>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium")
@pytest.mark.parametrize("width_px", [390, 500, 1280])
def test_it_works_in_a_browser(report: Report, tmp_path: Path, width_px: int) -> None:
    path = write_report(tmp_path, report)
    path.write_text(path.read_text(encoding="utf8").replace("</head>", PROBE, 1), encoding="utf8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [
        f"--window-size={width_px},900",
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", done.stdout)[0]))  # type: ignore[index]
    assert found.pop("copied") in ("copied", "selected: press Ctrl+C")  # by what a browser allows a file
    assert found.pop("keys") == "theme moment code copy"
    assert found == {"moved": "true step-000002", "charts": "2", "wide": "false", "themed": "true"}
    assert "CONSOLE" not in done.stderr


def test_rows_of_pictures_are_json_too(report: Report) -> None:
    page = report_html(report)
    written = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S)
    assert written is not None
    data = json.loads(written[1])
    assert data["rows"][0]["prompt"] == HOSTILE
    assert data["rows"][0]["moving"] == list(report.pictures[0].moving[:-1])
    assert isinstance(report.pictures[0], PictureRow)
