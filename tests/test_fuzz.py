"Damaged files and lying headers are read or refused in one sentence, in little time and memory, whatever a library makes of them."
import gzip, zlib
from pathlib import Path

import numpy as np
import pytest

from fuzz import COLUMNS, Reader, dicom, fuzz


def sound(rows, wrong, per_format):
    assert not wrong, "\n".join(map(str, wrong))
    for row in rows:
        assert row["read"] + row["refused"] == per_format and row["refused"] > 0, row
        assert row["peak_memory_mb"] < 1000, row


def test_damaged_files_are_read_or_refused():
    rows, wrong = fuzz(30)
    assert [r["format"] for r in rows] == ["NIfTI", "MetaImage", "NRRD", "PNG", "JPEG", "TIFF", "DICOM", "DICOM packed", "DICOM series"]
    sound(rows, wrong, 30)


@pytest.mark.slow
def test_thousands_of_damaged_files_are_read_or_refused():
    rows, wrong = fuzz(300, seed=1)
    assert sum(r["mutations"] for r in rows) >= 2000
    sound(rows, wrong, 300)


def bombs(folder):
    "Small files that declare, or unpack to, far more than they should; name and path."
    import nibabel, pydicom
    header = nibabel.Nifti1Header(); header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"], header["pixdim"][1:4] = b"n+1", 352, 1
    def nifti(name, shape, voxels):
        header["dim"][:4] = 3, *shape
        (folder/name).write_bytes(gzip.compress(header.binaryblock + bytes(4) + voxels, 1))
    nifti("terabyte.nii.gz", (30000, 30000, 30000), b""); nifti("gigabyte.nii.gz", (1000, 1000, 500), b"")
    nifti("more.nii.gz", (4, 4, 4), bytes(6 * 10**8))
    meta = ("ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nElementSpacing = 1 1 1\nDimSize = {}\n"
            "ElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    (folder/"declared.mha").write_bytes(meta.format("1000 1000 500").encode() + zlib.compress(bytes(1000)))
    (folder/"packed.mha").write_bytes(meta.format("4 4 4").encode() + zlib.compress(bytes(6 * 10**8), 1))
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: {}\nencoding: gzip\nendian: little\nspacings: 1 1 1\n\n"
    (folder/"declared.nrrd").write_bytes(nrrd.format("1000 1000 500").encode() + gzip.compress(bytes(1000)))
    (folder/"packed.nrrd").write_bytes(nrrd.format("4 4 4").encode() + gzip.compress(bytes(6 * 10**8), 1))
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    for name, side in (("wide.png", 60000), ("dense.png", 8000)):
        head = side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
        rest = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        (folder/name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest)
    plain, jpeg2000, deflated = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.1.99"
    lies = (("frames.dcm", plain, 8, dict(NumberOfFrames=2**31 - 1)), ("rows.dcm", plain, 8, dict(Rows=65535, Columns=65535)),
            ("places.dcm", jpeg2000, 8, dict(Rows=1, Columns=1, NumberOfFrames=2**30)), ("deflated.dcm", deflated, 12000, {}))
    for name, syntax, side, changes in lies:
        dicom(folder/name, np.zeros((side, side), np.int16), 0)
        h = pydicom.dcmread(folder/name)
        for entry, value in changes.items(): setattr(h, entry, value)
        if syntax == jpeg2000: h.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
        h.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(folder/name, h)
    return sorted(folder.iterdir())


def test_bombs_are_refused_before_they_take_memory(tmp_path):
    reader = Reader()
    for path in bombs(tmp_path):
        assert path.stat().st_size < 5_000_000
        result, seconds, peak = reader(path)
        assert result == "refused" and peak < 700, (path.name, result, seconds, peak)
    reader.close()


def test_the_figures_were_made_by_the_tool():
    table = [line.split(",") for line in (Path(__file__).parent.parent/"results/fuzz.csv").read_text().splitlines()]
    assert table[0] == COLUMNS and sum(int(row[1]) for row in table[1:]) >= 2000 and all(row[4] == "0" for row in table[1:])


def test_a_piece_of_packed_pixels_whose_length_lies_costs_nothing(tmp_path):
    "GDCM by itself takes gigabytes on it."
    import pydicom
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path/"a.jpg", quality=95)
    dicom(tmp_path/"a.dcm", pixels, 0)
    h, jpeg = pydicom.dcmread(tmp_path/"a.dcm"), (tmp_path/"a.jpg").read_bytes()
    h.BitsAllocated, h.BitsStored, h.HighBit, h.PixelRepresentation = 8, 8, 7, 0
    whole = pydicom.encaps.encapsulate([jpeg])
    h.PixelData = whole[:1000] + whole[1052:]
    h["PixelData"].VR, h["PixelData"].is_undefined_length = "OB", True
    h.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    pydicom.dcmwrite(tmp_path/"a.dcm", h)
    reader = Reader()
    result, seconds, peak = reader(tmp_path/"a.dcm")
    reader.close()
    assert result in ("read", "refused") and peak < 700, (result, seconds, peak)
