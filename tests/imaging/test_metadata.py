import io
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin
from sample_images import stream

from pfstorer_rt.imaging.files import encode_image, load_image
from pfstorer_rt.imaging.metadata import AI_SOURCE, Metadata, is_marked

IPTC = b"\x1c\x02\x69\x00\x05Title" + b"\x1c\x02\x19\x00\x04word"  # IIM 4.2: headline 2:105, keyword 2:25
XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    b'xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" tiff:Orientation="6" dc:source="album 3" '
    b'e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>'
    b'</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
EXT = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
FORMATS = ["png", "jpg", "webp", "tif"]


def pixels(height=8, width=12):
    return np.random.default_rng(0).random((height, width, 3))


def written(format, metadata):
    return Image.open(io.BytesIO(encode_image(pixels(), format, metadata=metadata)))


def properties(xmp):
    """{expanded name: value} of the attributes of all descriptions, by a parser of XML."""
    root = ElementTree.fromstring(xmp.decode())
    return {name: value for node in root.iter() for name, value in node.attrib.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_survive_a_file_of_every_format(format):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "Leica"
    given = Metadata(None, exif.tobytes(), XMP.replace(b'"6"', b'"1"'), IPTC, (300.0, 200.0))
    found = load_image(io.BytesIO(encode_image(pixels(), format, metadata=given))).metadata
    kept = Image.Exif()
    kept.load(found.exif)
    assert found.xmp == given.xmp and dict(kept) == dict(exif)
    assert found.iptc == (None if format == "webp" else IPTC)
    if format == "webp":  # which has no density of its own
        read = written(format, given).getexif()
        assert (read[0x011A], read[0x011B], read[0x0128]) == (300, 200, 2)
    else:
        assert found.dpi == pytest.approx((300, 200), abs=0.02)  # PNG stores whole pixels per metre


def test_pillow_reads_the_written_iptc():
    for format in ("jpg", "tif"):
        assert IptcImagePlugin.getiptcinfo(written(format, Metadata(iptc=IPTC)))[2, 105] == b"Title"


@pytest.mark.parametrize("format", FORMATS)
def test_the_mark_follows_iptc_and_is_valid_xml(format, tmp_path):
    image = written(format, Metadata().marked())
    assert properties(image.info["xmp"])[EXT + "DigitalSourceType"] == AI_SOURCE
    (tmp_path / "a").write_bytes(encode_image(pixels(), format, metadata=Metadata().marked()))
    (tmp_path / "b").write_bytes(encode_image(pixels(), format, metadata=Metadata(xmp=XMP)))
    (tmp_path / "c").write_text("no image")
    assert [is_marked(tmp_path / name) for name in "abcd"] == [True, False, False, False]


@pytest.mark.parametrize("element", [False, True])
def test_the_mark_replaces_an_earlier_source_type_and_keeps_the_rest(element):
    xmp = XMP
    if element:
        attribute = XMP[XMP.index(b" e:Dig") : XMP.index(b"/></rdf") - 1 + 1]
        value = attribute.split(b'"')[1]
        xmp = XMP.replace(
            attribute + b"/>", b"><e:DigitalSourceType>" + value + b"</e:DigitalSourceType></rdf:Description>"
        )
        assert ElementTree.fromstring(xmp.decode()) is not None
    marked = Metadata(xmp=xmp).marked()
    assert properties(marked.xmp)[EXT + "DigitalSourceType"] == AI_SOURCE
    assert marked.xmp.count(b"DigitalSourceType") == 1 and b"album 3" in marked.xmp
    assert marked.marked() == marked


def test_an_upright_result_has_an_upright_xmp_and_a_swapped_resolution():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = load_image(stream(Image.new("RGB", (24, 16)), "JPEG", exif=exif, xmp=XMP, dpi=(300, 150))).metadata
    assert b'tiff:Orientation="1"' in found.xmp and found.dpi == (150, 300)
    assert found.scaled(2, 3).dpi == (300, 900) and Metadata().scaled(2, 2) == Metadata()


def test_a_resolution_that_a_camera_did_not_state_is_not_invented():
    exif = Image.Exif()
    exif[0x010F] = "Leica"
    buffer = stream(Image.new("RGB", (24, 16)), "JPEG", exif=exif)
    assert Image.open(buffer).info["dpi"] == (72, 72)
    buffer.seek(0)
    assert load_image(buffer).metadata.dpi is None


@pytest.mark.parametrize("xmp", [b"\xff\xfe<\0x\0", b"<x/>", b"</rdf:RDF>" + b" " * (1 << 20), b"\0</rdf:RDF>"])
def test_xmp_that_cannot_be_kept_is_noted(xmp):
    read = load_image(stream(Image.new("RGB", (8, 8)), "WEBP", xmp=xmp))
    assert read.metadata.xmp is None and read.notes == ("XMP unreadable: ignored",)
    assert AI_SOURCE.encode() in read.metadata.marked().xmp


@pytest.mark.parametrize(
    "piece",
    ["<x:DigitalSourceType", "<x:DigitalSourceType>", ' x:DigitalSourceType="', " x:DigitalSourceType", "<x", " ", "x"],
)
def test_a_long_packet_of_unfinished_properties_is_read_at_once(piece):
    xmp = (piece * (1_000_000 // len(piece)) + "</rdf:RDF>").encode()
    started = time.monotonic()
    assert AI_SOURCE.encode() in Metadata(xmp=xmp).marked().xmp
    assert time.monotonic() - started < 2


def test_metadata_too_long_for_jpeg_are_left_out_but_the_mark_is_not():
    long = XMP.replace(b"album 3", b"x" * 70_000)
    kept = load_image(io.BytesIO(encode_image(pixels(), "jpg", metadata=Metadata(xmp=long, iptc=b"\x1c" * 70_000))))
    assert (kept.metadata.xmp, kept.metadata.iptc) == (None, None)
    marked = load_image(io.BytesIO(encode_image(pixels(), "jpg", metadata=Metadata(xmp=long).marked())))
    assert marked.metadata == Metadata().marked()


@pytest.mark.parametrize("dpi", [(0, 0), (1e9, 1e9), (float("nan"), 300), (70_000, 70_000)])
@pytest.mark.parametrize("format", ["jpg", "tif", "png"])
def test_an_impossible_resolution_does_not_stop_a_result(format, dpi):
    image = Image.new("RGB", (8, 8))
    image.info["dpi"] = dpi
    from pfstorer_rt.imaging.metadata import read_metadata

    assert read_metadata(image, None, []).dpi is None
    assert encode_image(pixels(), format, metadata=Metadata(dpi=(65_535.0, 65_535.0)).scaled(16, 16))
