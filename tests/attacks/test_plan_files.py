"""Hostile plan files: every one is refused when it is opened, in one line, without reading a payload."""

import io
import json
import os
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON, with_value
from small_plan import small_manifest, small_payloads

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.plan import COMPONENTS, Manifest, Plan, write_plan

PAYLOADS = small_payloads()


def manifest():
    """The JSON form of a valid manifest."""
    return json.loads(small_manifest(PAYLOADS).to_json())


def archive(entries, text=None, **options):
    """The bytes of a zip: the manifest (or another text), the payloads, and more entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, data in {"manifest.json": json.dumps(manifest()) if text is None else text, **entries}.items():
            file.writestr(name, data)
    return buffer.getvalue()


def whole():
    return archive({f"{c}.onnx": data for c, data in PAYLOADS.items()})


@pytest.fixture
def refused(tmp_path):
    """Function bytes -> message of the refusal."""

    def call(data):
        path = tmp_path / "a.plan"
        path.write_bytes(data)
        with pytest.raises(BadFileError) as caught:
            Plan.open(path)
        text = str(caught.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 600
        return text

    return call


def flags(data, name, position, value):
    """Set a 16-bit field in both headers of an entry: the central one, and the local one two bytes earlier."""
    raw, encoded = bytearray(data), name.encode()
    central = raw.rindex(encoded) - 46
    local = raw.index(encoded) - 30
    struct.pack_into("<H", raw, central + position + 2, value)
    struct.pack_into("<H", raw, local + position, value)
    return bytes(raw)


def test_an_exported_plan_is_opened(tmp_path):
    (tmp_path / "a.plan").write_bytes(whole())
    assert Plan.open(tmp_path / "a.plan").read("encoder") == PAYLOADS["encoder"]


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx"])
@pytest.mark.parametrize(("position", "value"), [(6, 1), (8, 99), (8, 8)], ids=["encrypted", "unknown", "deflated"])
def test_an_entry_that_is_not_stored_as_plain_data_is_refused(refused, name, position, value):
    assert "expected plain data" in refused(flags(whole(), name, position, value))


def test_an_entry_that_inflates_is_refused_before_it_is_read(refused):
    import tracemalloc

    bomb = archive({"encoder.onnx": bytes(200 << 20)}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    assert "is compressed" in refused(bomb)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"x",
        lambda data: b"#!/bin/sh\n" + data,
        lambda data: data[:-2] + struct.pack("<H", 5) + b"hello",
        lambda data: data.replace(b"PK\1\2", b"code and data here" + b"PK\1\2", 1),
        lambda data: data[:100] + data[90:],
    ],
    ids=["behind", "in front", "comment", "between", "overlap"],
)
def test_bytes_outside_all_entries_are_refused(refused, change):
    refused(change(whole()))


def test_unknown_entries_of_a_plan_are_refused(refused):
    extra = {f"{c}.onnx": data for c, data in PAYLOADS.items()}
    assert "belongs to no plan" in refused(archive({**extra, "run.py": b"import os"}))
    assert "entries" in refused(archive({f"{i}.bin": b"" for i in range(5000)}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(refused):
    buffer = io.BytesIO(whole())
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("encoder.onnx", b"other")
    assert "different names" in refused(buffer.getvalue())


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"kind": "pfstorer-plan", "kind": "pfstorer-plan"}',
        json.dumps(manifest()).replace('"steps": 4', '"steps": NaN'),
        json.dumps(manifest()).replace('"steps": 4', '"steps": ' + "9" * 5000),
        "\ufeff{}",
        b"\xff\xfe\x00",
        " " * (5 << 20),
        "null",
    ],
    ids=["nested lists", "nested objects", "repeated key", "NaN", "digits", "BOM", "no UTF-8", "large", "null"],
)
def test_json_without_a_manifest_is_refused(refused, text):
    refused(archive({}, text))


WRONG = {
    "tile": ["64", None, 63, 2**40, 0, -64, True, 64.0, float("1e308")],
    "factor": [0, -8, "8", None, 3, 2**31],
    "steps": [1.5, 0, -1, 10**9, "4", True, None],
    "sampler": [[], "evil", None, 1, {"a": 1}],
    "prediction_type": ["sample", "", None, []],
    "latent_channels": [0, -4, "4", 2**31, None],
    "cfw": [True, "yes", 1, None],
    "strength": [True, 0, None],
    "cfw_weight": [1e308, "1", None],
    "licence": ["x" * 10_000, 7, None],
    "method": ["evil", 3],
    "payloads": [{}, None, [], "encoder"],
    "schema": [0, -1, 2**70, "2", True, None, 1.0],
    "kind": ["PFSTORER-PLAN", None, 1],
    "schedule": [None, [], {"steps": 10**9}, {"beta_start": "0"}, {"kind": []}],
    "tools": [{"a": 1}, {str(i): "1" for i in range(1000)}],
    "base_name": ["a\nb", "\x1b[2J", "", None, 5],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_of_another_type_or_out_of_range_is_refused(refused, field, value):
    entries = {f"{c}.onnx": data for c, data in PAYLOADS.items()}
    refused(archive(entries, json.dumps({**manifest(), field: value})))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "0"),
        ("inputs", None),
        ("inputs", {"x": {"shape": [-1], "type": "float32"}}),
        ("inputs", {"x": {"shape": ["batch"]}}),
        ("inputs", {"x": {"shape": [1] * 100, "type": "float32"}}),
        ("parity", {"relative": "0"}),
        ("precision", "fp64"),
        ("profiles", [{"x": [[1]]}]),
        ("layers", {"Conv": -1}),
        ("weights", "encoder.weights"),
        ("weights_sha256", "x"),
        ("code", "import os"),
    ],
)
def test_a_payload_of_another_form_is_refused(refused, field, value):
    changed = manifest()
    changed["payloads"]["encoder"][field] = value
    entries = {f"{c}.onnx": data for c, data in PAYLOADS.items()}
    refused(archive({**entries, "encoder.weights": b""}, json.dumps(changed)))


def test_a_pipe_a_link_loop_and_a_folder_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.plan")
    (tmp_path / "loop.plan").symlink_to(tmp_path / "loop.plan")
    for path in (tmp_path / "pipe.plan", tmp_path / "loop.plan", tmp_path, "/dev/zero"):
        with pytest.raises(BadFileError, match=r"no such plan|a folder; expected a plan file"):
            Plan.open(path)


def test_a_plan_that_changes_after_it_was_opened_is_checked_again(tmp_path):
    (tmp_path / "a.plan").write_bytes(whole())
    plan = Plan.open(tmp_path / "a.plan")
    (tmp_path / "a.plan").write_bytes(flags(whole(), "encoder.onnx", 6, 1))
    with pytest.raises(BadFileError, match="encrypted"):
        plan.read("encoder")


# ---- properties

PATHS = [(key,) for key in manifest()] + [("payloads", "encoder", key) for key in manifest()["payloads"]["encoder"]]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_of_any_field_of_a_manifest_is_accepted_or_raises_value_error(path, value):
    changed = with_value(manifest(), path, value)
    try:
        found = Manifest.from_dict(changed)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    assert Manifest.from_dict(json.loads(found.to_json())) == found
    assert 16 <= found.tile <= 8192 and found.tile % found.factor == 0 and 1 <= found.steps <= 1000


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_json_is_a_manifest_or_raises_value_error(value):
    with pytest.raises(ValueError, match=r".+"):
        Manifest.from_dict(value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_plan_is_harmless_or_refused(tmp_path_factory, data):
    raw = bytearray(whole())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.plan"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        plan = Plan.open(path)
        contents = {c: plan.read(c) for c in COMPONENTS}
    except BadFileError:
        return
    assert contents == PAYLOADS


def test_every_written_plan_is_accepted(tmp_path):
    written = write_plan(tmp_path / "a.plan", Manifest.from_dict(manifest()), PAYLOADS)
    assert written.manifest.to_json() == json.dumps(manifest(), indent=2, sort_keys=True)
