"""Small colour profiles in the layout of ICC.1:2001-04, so that the expected colours follow from a formula."""

import struct

import numpy as np

D50 = (0.9642, 1, 0.8249)


def s15(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def gamma_curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def matrix_profile(primaries, curve):
    tags = {
        name: b"XYZ \0\0\0\0" + s15(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    tags.update(dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))
    return assemble(b"RGB ", tags)


def grey_profile(gamma):
    return assemble(b"GRAY", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile(value):
    """A CMYK profile with one 8-bit Lab value for all colours without K, and black for full K."""
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4
    table += (bytes(value) + b"\0\x80\x80") * 8 + identity * 3
    return assemble(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def assemble(space, tags, kind=b"mntr", connection=b"XYZ "):
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(81)
    white = b"XYZ \0\0\0\0" + s15(*D50)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white, **tags}
    directory, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        directory += name + struct.pack(">II", at + len(body), len(data))
        body += data
    total = at + len(body)
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    head = struct.pack(">I", total) + bytes(4) + b"\x02\x10\0\0" + kind + space + connection + date + b"acsp"
    head += bytes(28) + s15(*D50)
    return head.ljust(128, b"\0") + directory + body


# Red, green, blue, adapted to D50 by Bradford (Lindbloom's table).
SRGB_XYZ = ((0.43607, 0.22250, 0.01393), (0.38506, 0.71688, 0.09710), (0.14308, 0.06062, 0.71417))


def matrix_srgb_profile():
    """sRGB as another maker rounds it: the curve as 1024 samples."""
    x = np.linspace(0, 1, 1024)
    curve = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    table = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(curve * 65535).astype(">u2").tobytes()
    return matrix_profile(SRGB_XYZ, table)
