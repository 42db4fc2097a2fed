"""The zip of a plan: a few uncompressed entries, one behind the other, and nothing else.

The entries have the sizes of their bytes in the file, so no entry can inflate. Everything is checked before an entry is
read.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from pfstorer_rt.files import open_plain

_ENTRIES = 16
_END = struct.Struct("<4s4H2LH")  # end of central directory record (PKWARE appnote, 4.3.16)
_LOCAL = 30  # bytes of a local file header without name and extra field (appnote, 4.3.7)


def read_entries(path: Path, sizes: dict[str, int]) -> tuple[dict[str, bytes], set[str]]:
    """Check a zip and read some small entries; returns ({name: content} of those present, names of all entries).

    sizes: name of each entry to read and its largest size in bytes.
    Raises `ValueError`, `zipfile.BadZipFile` or OSError for any other file.
    """
    with open_plain(path) as file, zipfile.ZipFile(file) as archive:
        check_entries(archive, file)
        names = set(archive.namelist())
        for name, most in sizes.items():
            if name in names and archive.getinfo(name).file_size > most:
                raise ValueError(f"{name} has {archive.getinfo(name).file_size} bytes, expected at most {most}")
        return {name: archive.read(name) for name in sizes if name in names}, names


def check_entries(archive: zipfile.ZipFile, file: BinaryIO) -> None:
    """Raise `ValueError` unless the zip has only stored entries that fill the file without gaps."""
    entries = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = [info.filename for info in entries]
    if not 0 < len(entries) <= _ENTRIES or len(set(names)) < len(names):
        raise ValueError(f"{len(entries)} entries, expected 1 to {_ENTRIES} with different names")
    position = 0
    for info in entries:
        if info.flag_bits & 1:
            raise ValueError(f"{info.filename[:80]!r} is encrypted, expected plain data")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename[:80]!r} is compressed, expected plain data")
        start = place(file, info)
        if info.header_offset != position:
            raise ValueError(f"{info.filename[:80]!r} begins at byte {info.header_offset}, expected {position}")
        position = start + info.file_size
    if archive.start_dir != position or not _ends_without_comment(file):
        raise ValueError("bytes that belong to no entry")


def place(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's first byte in the file; raises `ValueError` for a header of another entry."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL)
    if len(header) < _LOCAL or header[:4] != b"PK\3\4":
        raise ValueError(f"{info.filename[:80]!r} has no header")
    return info.header_offset + _LOCAL + sum(struct.unpack("<HH", header[26:30]))


def _ends_without_comment(file: BinaryIO) -> bool:
    size = file.seek(0, 2)
    file.seek(max(0, size - _END.size))
    last = file.read(_END.size)
    return len(last) == _END.size and last[:4] == b"PK\5\6" and _END.unpack(last)[-1] == 0
