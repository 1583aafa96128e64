"""The stage `ocr_text` on drawn pictures and short films, with the real detector and the real reader."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem, Product
from media_assets.stages.ocr_text import OcrText
from resources.errors import ModelUnavailable, NotApplicable
from resources.files.derived import DerivedStore
from resources.models.registry import CATALOGUE, ModelRegistry
from resources.settings import Settings

SIZE = (480, 270)


class Desk:
    """Runs the stage over stills given as pictures."""

    def __init__(self, stage: OcrText, store: DerivedStore) -> None:
        self.stage = stage
        self.store = store

    def read(self, kind: str, pictures: Sequence[Image.Image], repeat_of: Sequence[int | None] = ()) -> Product:
        """One still per second; `repeat_of` names the frame of an earlier still, or None."""
        media_id = "item"
        self.put_media(media_id, kind)
        repeats = repeat_of or [None] * len(pictures)
        rows = [
            still(media_id, at, picture, repeat, 0.0 if kind == "image" else 1.0)
            for at, (picture, repeat) in enumerate(zip(pictures, repeats, strict=True))
        ]
        self.store.write("frames", media_id, schemas.table(schemas.FRAMES, rows))
        inputs = Inputs(MediaItem(media_id, "file:///item", "1"), self.store, "v1", wants_preview=True)
        prepared = self.stage.prepare(inputs)
        outputs = self.stage.infer(prepared.units) if prepared.units else {}
        assert outputs.keys() == {unit.id for unit in prepared.units}
        return self.stage.assemble(inputs, prepared.carry, outputs)

    def put_media(self, media_id: str, kind: str) -> None:
        row: dict[str, object] = {"media_id": media_id, "uri": "file:///item", "sha256": "0" * 64, "kind": kind}
        row |= {"mime": "x/y", "bytes": 1, "has_audio": False, "version": "v1"}
        self.store.write("media", media_id, schemas.table(schemas.MEDIA, [row]))


@pytest.fixture(scope="module")
def stage(models: ModelRegistry) -> OcrText:
    stage = OcrText(models.settings, models)
    stage.load()
    return stage


@pytest.fixture
def desk(stage: OcrText, tmp_path: Path) -> Desk:
    return Desk(stage, DerivedStore(tmp_path))


def still(media_id: str, at: int, picture: Image.Image, repeat: int | None, length_s: float) -> dict[str, object]:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=92)
    row: dict[str, object] = {"media_id": media_id, "frame": at * 25, "repeat_of": repeat, "image": sink.getvalue()}
    row |= {"start_s": at * length_s, "end_s": (at + 1) * length_s, "width": picture.width, "height": picture.height}
    return row | {"reason": "interval", "phash": b"\0" * 8, "version": "v1"}


def card(*lines: tuple[str, int, int], size: tuple[int, int] = SIZE, height: int = 32, shade: int = 250) -> Image.Image:
    """A plain picture with text at the given places."""
    picture = Image.new("RGB", size, (shade, shade, shade))
    pen = ImageDraw.Draw(picture)
    for text, x, y in lines:
        pen.text((x, y), text, fill=(20, 20, 20), font=ImageFont.load_default(height))
    return picture


def texts(product: Product) -> list[str]:
    return list(product.table["text"].to_pylist())


def test_a_page_is_read_in_order_with_polygons_around_the_lines(desk: Desk) -> None:
    product = desk.read("image", [card(("Second line below", 40, 150), ("Opening words", 40, 60))])
    assert texts(product) == ["Opening words", "Second line below"]
    assert product.table.schema.equals(schemas.OCR_TEXT)
    first = product.table.to_pylist()[0]
    assert (first["start_s"], first["end_s"], first["frames_seen"]) == (0.0, 0.0, 1)
    (left, top), (right, bottom) = ((first["polygon"][i]["x"], first["polygon"][i]["y"]) for i in (0, 2))
    assert left * SIZE[0] == pytest.approx(40, abs=12)
    assert top * SIZE[1] < 75 < 90 < bottom * SIZE[1] < 130
    assert 0.3 < right < 0.7
    picture = Image.open(io.BytesIO(product.previews["ocr_overlay"]))
    assert picture.format == "JPEG"
    assert len(product.previews["ocr_overlay"]) <= 25_000


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_page_is_read_in_its_own_order(desk: Desk, degrees: int) -> None:
    page = card(("The quick brown fox", 40, 60), ("jumps over a lazy dog", 40, 140)).rotate(degrees, expand=True)
    assert texts(desk.read("image", [page])) == ["The quick brown fox", "jumps over a lazy dog"]


def test_a_tiny_crop_of_one_word_is_read(desk: Desk) -> None:
    assert texts(desk.read("image", [card(("harbour", 5, 1), size=(100, 26), height=20)])) == ["harbour"]


def test_a_picture_without_text_gives_no_rows_and_never_meets_the_reader(desk: Desk) -> None:
    ramp = np.linspace(0, 255, 640 * 480, dtype=np.float32).reshape(480, 640)
    product = desk.read("image", [Image.fromarray(ramp.astype(np.uint8)).convert("RGB")])
    assert product.table.num_rows == 0
    assert product.previews == {}
    assert (product.facts["stills_read"], product.facts["stills_spared_no_text"]) == (0, 1)


def test_a_title_is_read_once_and_spans_all_stills_that_show_it(desk: Desk) -> None:
    blank, title = card(), card(("Harbour at dawn", 60, 100))
    moving = title.copy()
    ImageDraw.Draw(moving).ellipse((380, 200, 440, 260), fill=(90, 160, 90))
    product = desk.read("video", [blank, title, moving, title, blank], [None, None, None, 25, None])
    (row,) = product.table.to_pylist()
    assert row["text"] == "Harbour at dawn"
    assert (row["start_s"], row["end_s"], row["frames_seen"], row["frame"]) == (1.0, 4.0, 3, 25)
    assert {name: product.facts[name] for name in product.facts if name != "lines"} == {
        "stills": 5,
        "stills_read": 1,
        "stills_spared_repeat": 1,
        "stills_spared_no_text": 2,
        "stills_spared_unchanged": 1,
    }


def test_a_counter_is_read_anew_when_one_digit_changes(desk: Desk) -> None:
    product = desk.read("video", [card((f"Lap number {n}", 60, 100)) for n in (3, 4, 7)])
    assert texts(product) == ["Lap number 3", "Lap number 4", "Lap number 7"]
    assert product.table["start_s"].to_pylist() == [0.0, 1.0, 2.0]
    assert product.facts["stills_read"] == 3


def test_pages_of_several_items_share_a_micro_batch(desk: Desk) -> None:
    stage = desk.stage
    units = []
    for media_id, word in (("one", "window"), ("two", "garden")):
        desk.put_media(media_id, "image")
        rows = [still(media_id, 0, card((word, 60, 100)), None, 0.0)]
        desk.store.write("frames", media_id, schemas.table(schemas.FRAMES, rows))
        inputs = Inputs(MediaItem(media_id, "file:///item", "1"), desk.store, "v1")
        (unit,) = stage.prepare(inputs).units
        units.append(type(unit)(f"{media_id}/{unit.id}", unit.payload))
    together = stage.infer(units)
    assert {key: page.lines[0][0] for key, page in together.items()} == {
        "one/still-0": "window",
        "two/still-0": "garden",
    }
    assert stage.infer(units[1:])["two/still-0"] == together["two/still-0"]


def test_each_page_of_a_micro_batch_has_a_way_up_of_its_own(desk: Desk) -> None:
    """Given pages that stand, lie and hang in one micro-batch, then each is read as if it were alone."""
    page = card(("The quick brown fox", 40, 60), ("jumps over a lazy dog", 40, 140))
    units = []
    for at, degrees in enumerate((0, 90, 180, 270)):
        media_id = f"item{at}"
        desk.put_media(media_id, "image")
        rows = [still(media_id, 0, page.rotate(degrees, expand=True), None, 0.0)]
        desk.store.write("frames", media_id, schemas.table(schemas.FRAMES, rows))
        (unit,) = desk.stage.prepare(Inputs(MediaItem(media_id, "file:///item", "1"), desk.store, "v1")).units
        units.append(type(unit)(f"{media_id}/{unit.id}", unit.payload))
    together = desk.stage.infer(units)
    assert [together[unit.id].turn for unit in units] == [0, 3, 2, 1]
    for unit in units:
        assert {line.text for line in together[unit.id].lines} == {"The quick brown fox", "jumps over a lazy dog"}
        assert desk.stage.infer([unit]) == {unit.id: together[unit.id]}


def test_every_reader_answers_each_region_in_the_order_given(stage: OcrText) -> None:
    picture = np.asarray(card(("Upper words", 40, 40), ("Lower words", 40, 160)))
    lower, upper = (np.array([[30, top], [260, top], [260, top + 50], [30, top + 50]], np.float32) for top in (153, 33))
    other = np.asarray(card(("Elsewhere", 40, 160)))
    for spec in stage.models.candidates("ocr"):
        reader = import_module(f"resources.models.{spec.adapter}").load(spec, stage.models.cache)
        answers = reader.read([(picture, lower), (other, lower), (picture, upper)])
        assert [answer.text.strip() for answer in answers] == ["Lower words", "Elsewhere", "Upper words"], spec.name
        assert all(0.5 < answer.confidence <= 1.0 for answer in answers)
        assert reader.read([]) == ()


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_what_has_no_picture_is_not_applicable(desk: Desk, kind: str) -> None:
    desk.put_media("item", kind)
    with pytest.raises(NotApplicable, match=kind):
        desk.stage.prepare(Inputs(MediaItem("item", "file:///item", "1"), desk.store, "v1"))


def routed(folder: Path, cache: Path, catalogue: str) -> OcrText:
    """The stage with another catalogue, on the session's built weights."""
    (folder / "models").symlink_to(cache)
    path = folder / "models.toml"
    path.write_text(catalogue)
    models = ModelRegistry(Settings(home=folder), path)
    return OcrText(models.settings, models)


def readers(product: Product) -> tuple[set[str], list[str]]:
    """Names in the column `model`, and of the models that answered for the item."""
    assert product.models is not None
    rows = {name.partition("@")[0] for name in product.table["model"].to_pylist()}
    return rows, [name.partition("@")[0] for name in product.models]


def test_sure_lines_are_read_by_the_cheap_reader_alone(desk: Desk) -> None:
    """Given clear print, some of it upside down, then the first reader of the route answers for every line."""
    page = card(("Opening words", 40, 60), ("Second line below", 40, 150))
    for picture in (page, page.rotate(180)):
        product = desk.read("image", [picture])
        assert texts(product) == ["Opening words", "Second line below"]
        assert readers(product) == ({"ppocr-v6-rec-small"}, ["ppocr-v6-rec-small", "ppocr-v6-det-small"])


def test_lines_nobody_is_sure_of_go_to_the_next_reader(models: ModelRegistry, tmp_path: Path) -> None:
    """Given a threshold no reading reaches, then the champion reads every line, and rows and item say so."""
    sceptical = CATALOGUE.read_text().replace("min_confidence = [0.8]", "min_confidence = [2.0]")
    product = Desk(routed(tmp_path, models.cache, sceptical), DerivedStore(tmp_path / "derived")).read(
        "image", [card(("Opening words", 40, 60), ("Second line below", 40, 150)).rotate(180)]
    )
    assert texts(product) == ["Opening words", "Second line below"]
    assert readers(product) == ({"easyocr-english-g2"}, ["easyocr-english-g2", "ppocr-v6-det-small"])


def test_a_reader_that_does_not_load_is_replaced_as_declared(models: ModelRegistry, tmp_path: Path) -> None:
    """Given weights that are not the pinned ones, then the fallback reads, and without one the item fails."""
    pinned = "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
    damaged = CATALOGUE.read_text().replace(pinned, "0" * 64)
    stage = routed(tmp_path, models.cache, damaged)
    stage.load()
    product = Desk(stage, DerivedStore(tmp_path / "derived")).read("image", [card(("Opening words", 40, 60))])
    assert texts(product) == ["Opening words"]
    assert readers(product) == ({"easyocr-english-g2"}, ["easyocr-english-g2", "ppocr-v6-det-small"])
    (tmp_path / "alone").mkdir()
    alone = damaged.replace('fallback = ["easyocr-english-g2", "ppocr-v6-rec-small"]', "")
    with pytest.raises(ModelUnavailable, match="of ppocr-v6-rec-small"):
        routed(tmp_path / "alone", models.cache, alone).load()
