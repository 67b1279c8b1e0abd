"""Damage image files of every format in thousands of ways and see that reading them gives an image or one sentence: `results/fuzz.csv`.

Each file is read in a process with a limit on memory and on time, for a library that crashes or hangs takes its process with it.
Real files are damaged where PCRL_DATA names a folder with them, and small ones that are made here."""
import argparse, csv, gzip, os, resource, shutil, signal, subprocess, sys, tempfile, time, zlib
from pathlib import Path

import numpy as np

COLUMNS = ["format", "mutations", "read", "refused", "crashed", "slowest_seconds", "peak_memory_mb"]
MEMORY, SECONDS = 4 * 2**30, 20  # of address space for the reading process, and for one file
PATIENT = "DOE^JOHN"


# --- the process that reads -----------------------------------------------------------------------------------------------

def serve():
    "Read every source that stdin names: its header, then all of it. One line of result each, the memory it took last."
    import warnings
    from pcrl.volumes import VolumeError, find_images, read_header, read_volume
    warnings.simplefilter("error")  # a warning would be printed: as bad as a traceback
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import nibabel, pydicom, PIL.Image, SimpleITK  # noqa: imported by the readers when first used
    out = os.fdopen(os.dup(1), "w")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        path = Path(line.strip())
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
        signal.alarm(SECONDS)
        results = []
        for read in (read_header, read_volume) + ((lambda p: find_images(p, 3),) if path.is_dir() else ()):
            try: read(path); results.append("read")
            except VolumeError as e: results.append("refused" if one_sentence(str(e)) else f"crashed {e!r}")
            except BaseException as e: results.append(f"crashed {e!r}")
        signal.alarm(0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        bad = [r for r in results if r.startswith("crashed")]
        print((bad[0] if bad else results[1]).replace("\n", " "), int(status["VmHWM"].split()[0]) // 1024, sep="\t", file=out, flush=True)


def one_sentence(message): return "\n" not in message and len(message) < 600 and PATIENT[:3] not in message


class Reader:
    "Such a process, started again when it dies."
    def __init__(self): self.start()

    def start(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # codecs print in C++
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], **pipes)
        self.process.stdout.readline()  # it is ready: imports are not counted

    def __call__(self, path):
        "(result, seconds, peak MB) of one source."
        if self.process is None: self.start()
        start = time.monotonic()
        self.process.stdin.write(f"{path}\n"); self.process.stdin.flush()
        line = self.process.stdout.readline()
        seconds = time.monotonic() - start
        if not line:
            code = self.process.wait()
            self.process = None
            return f"crashed {signal.Signals(-code).name if code < 0 else f'exit {code}'}", seconds, 0
        result, peak = line.rstrip("\n").split("\t")
        return result, seconds, int(peak)

    def close(self):
        if self.process: self.process.stdin.close(); self.process.wait(); self.process.stdout.close()


# --- files to damage ------------------------------------------------------------------------------------------------------

def made(folder):
    "Small files of every format that can be made without a kit: format, sources."
    import nibabel, SimpleITK as sitk
    from PIL import Image
    voxels = np.random.default_rng(0).integers(0, 999, (6, 7, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2., 3, 4, 1])), folder/"a.nii")
    nibabel.save(nibabel.Nifti2Image(np.stack([voxels] * 2, 3), np.eye(4)), folder/"b.nii")
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2., 3, 4, 1])), folder/"a.nii.gz")
    image = sitk.GetImageFromArray(voxels)
    for name, packed in (("a.mhd", False), ("z.mhd", True), ("a.mha", False), ("z.mha", True), ("a.nrrd", False), ("z.nrrd", True)):
        sitk.WriteImage(image, str(folder/name), useCompression=packed)
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([voxels] * 2, -1), isVector=True), str(folder/"v.nrrd"))
    grey = (np.add.outer(np.arange(64), np.arange(80)) % 256).astype(np.uint8)
    deep, colour = grey.astype(np.uint16) * 200, np.stack([grey] * 3, -1)
    for name, pixels in {"a.png": grey, "deep.png": deep, "a.jpg": grey, "rgb.jpg": colour, "a.tif": grey, "deep.tif": deep}.items():
        Image.fromarray(pixels).save(folder/name)
    Image.fromarray(grey).save(folder/"z.tif", compression="tiff_lzw"); Image.fromarray(grey).save(folder/"j.tif", compression="jpeg")
    for k in range(4): dicom(folder/"series"/f"{k}.dcm", voxels[k], k)
    dicom(folder/"plain.dcm", voxels[0], 0); dicom(folder/"deflated.dcm", voxels[0], 0, "1.2.840.10008.1.2.1.99")
    dicom(folder/"rle.dcm", voxels[0], 0, rle=True)
    names = {"NIfTI": ("a.nii", "b.nii", "a.nii.gz"), "MetaImage": ("a.mhd", "z.mhd", "a.mha", "z.mha"),
             "NRRD": ("a.nrrd", "z.nrrd", "v.nrrd"), "PNG": ("a.png", "deep.png"), "JPEG": ("a.jpg", "rgb.jpg"),
             "TIFF": ("a.tif", "deep.tif", "z.tif", "j.tif"),
             "DICOM": ("plain.dcm", "deflated.dcm"), "DICOM packed": ("rle.dcm",), "DICOM series": ("series",)}
    return {format: [folder/name for name in of] for format, of in names.items()}


def dicom(path, pixels, k, syntax="1.2.840.10008.1.2.1", rle=False):
    "One CT slice of a patient whose name must not be seen again."
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    h = Dataset()
    h.update(dict(PatientID=PATIENT, PatientName=PATIENT, Rows=pixels.shape[0], Columns=pixels.shape[1], SamplesPerPixel=1,
                  PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=1,
                  Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2", SOPInstanceUID=f"1.2.3.{k}", SeriesInstanceUID="1.2.9",
                  PixelSpacing=[0.5, 0.5], ImagePositionPatient=[0, 0, 3 * k], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], SliceThickness=3,
                  RescaleIntercept=-1024, RescaleSlope=1))
    h.PixelData = pixels.tobytes(); h["PixelData"].VR = "OW"
    h.file_meta = FileMetaDataset(); h.file_meta.TransferSyntaxUID = syntax
    if rle: h.compress(pydicom.uid.RLELossless)
    path.parent.mkdir(exist_ok=True)
    pydicom.dcmwrite(path, h, enforce_file_format=True)


def real(kit, folder):
    "Real files of a data kit, by the same formats; JPEG and TIFF are made of a real radiograph."
    from PIL import Image
    film = next((kit/"nih_cxr14_subset").rglob("*.png"))
    for name in ("film.jpg", "film.tif"): Image.open(film).save(folder/name)
    of = lambda under, suffix, names: [kit/under/f"{name}{suffix}" for name in names.split()]
    return {"PNG": [film], "JPEG": [folder/"film.jpg"], "TIFF": [folder/"film.tif"],
            "NIfTI": of("formats/nifti", "", "niivue_low_res.nii.gz nibabel_functional.nii nibabel_example4d.nii.gz")
                     + of("hippocampus/imagesTr", ".nii.gz", "hippocampus_001"),
            "MetaImage": of("formats", "", "mhd_raw/ct_flipped_xy.mhd mhd_raw/ct_luna16_like_compressed.mha nrrd_mha/niivue_mha.mha"),
            "NRRD": of("formats/nrrd_mha", ".nrrd", "pyradiomics_prostate_phantom_subvolume pyradiomics_breast1_label"),
            "DICOM": of("formats/dicom_odd", ".dcm", "CT_small MR_small_bigendian MR_small_implicit enhanced_multiframe_enh rtdose "
                                                     "mlut_18 image_dfl no_meta liver"),
            "DICOM packed": of("formats/dicom_odd", ".dcm", "MR_small_RLE MR_small_jp2klossless MR_small_jpeg_ls_lossless JPEG-LL "
                                                            "JPGExtended JPEG2000 txv_Fake_MONOHR1 emri_small_jpeg_2k_lossless "
                                                            "OBXXXX1A_rle bad_sequence SC_rgb_rle_16bit"),
            "DICOM series": of("formats/dicom_series", "", "ct_3slice")}


# --- damage ---------------------------------------------------------------------------------------------------------------

def damaged(data, rng):
    "The bytes with one kind of damage: bits, the end, numbers, digits, or a piece."
    data, kind = bytearray(data), rng.choice(["bits", "header bits", "end", "number", "number", "digits", "piece"])
    head = min(len(data), int(rng.choice([64, 400, 2000])))
    at = int(rng.integers(head))
    if kind in ("bits", "header bits"):
        for at in rng.integers(head if kind != "bits" else len(data), size=rng.integers(1, 9)): data[at] ^= 1 << int(rng.integers(8))
    elif kind == "end": del data[int(rng.integers(len(data))):]
    elif kind == "number":  # a length, a size or a place becomes an extreme one
        size = int(rng.choice([1, 2, 4, 8])); top = 2**(8 * size)
        value = [0, 1, top // 2 - 1, top // 2, top - 1, 2**(4 * size)][rng.integers(6)]
        data[at:at + size] = value.to_bytes(size, str(rng.choice(["little", "big"])))
    elif kind == "digits":  # the same in text
        digits = [i for i, b in enumerate(data[:2000]) if 48 <= b <= 57]
        lies = [b"0", b"-1", b"99999999999", b"1e308", b"nan", b"x", b"", b"4294967297"]
        if digits: at = int(rng.choice(digits)); data[at:at + 1] = lies[rng.integers(len(lies))]
    else:
        size = int(rng.integers(1, 65)); piece = bytes(data[at:at + size]); to = int(rng.integers(len(data)))
        if rng.random() < 0.5: data[to:to] = piece
        else: del data[at:at + size]
    return bytes(data)


def resealed(data):
    "A PNG with its checksums made right again, so that the damage is not found by them alone."
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at:at + 4], "big")
        body = data[at + 4:at + 8 + size]
        out += data[at:at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + size
    return bytes(out)


def damage(source, folder, rng):
    "A damaged copy of a source, in the folder."
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix == ".dcm")
        victim, to = files[rng.integers(len(files))], folder/"series"
        to.mkdir()
        for file in files: (to/file.name).write_bytes(damaged(file.read_bytes(), rng) if file == victim else file.read_bytes())
        return to
    suffix = "".join(source.suffixes[-2:]) if source.suffix == ".gz" else source.suffix
    data, to = source.read_bytes(), folder/f"file{suffix}"
    if source.suffix == ".gz" and rng.random() < 0.7: data = gzip.compress(damaged(gzip.decompress(data), rng), 1)
    elif source.suffix == ".png" and rng.random() < 0.7: data = resealed(damaged(data, rng))
    else: data = damaged(data, rng)
    to.write_bytes(data)
    if source.suffix == ".mhd":
        for raw in source.parent.glob(f"{source.stem}.*raw"): shutil.copy(raw, folder)
    return to


def fuzz(per_format, seed=0, kept=None):
    "Rows of `COLUMNS`, one a format, and a list of (format, number, result) of what went wrong; the files of that are copied to `kept`."
    kit, rows, wrong, reader = os.environ.get("PCRL_DATA"), [], [], Reader()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); (tmp/"made").mkdir(); (tmp/"real").mkdir()
        sources = made(tmp/"made")
        for format, files in (real(Path(kit), tmp/"real") if kit else {}).items(): sources[format] += files
        for format, files in sources.items():
            row = dict.fromkeys(COLUMNS, 0) | dict(format=format, mutations=per_format)
            for k in range(per_format):
                rng = np.random.default_rng([seed, k, *format.encode()])
                with tempfile.TemporaryDirectory(dir=tmp) as folder:
                    path = damage(files[k % len(files)], Path(folder), rng)
                    result, seconds, peak = reader(path)
                    row[result.split()[0]] += 1
                    row["slowest_seconds"] = max(row["slowest_seconds"], round(seconds, 2))
                    row["peak_memory_mb"] = max(row["peak_memory_mb"], peak)
                    if result.startswith("crashed"):
                        wrong.append((format, k, files[k % len(files)].name, result))
                        if kept: shutil.copytree(folder, Path(kept)/f"{format}-{k}".replace(" ", "-"), dirs_exist_ok=True)
            rows.append(row)
    reader.close()
    return rows, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-format", type=int, default=300, help="damaged files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", help="folder for the files that went wrong")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: sys.exit(serve())
    rows, wrong = fuzz(args.per_format, args.seed, args.kept)
    with open(Path(__file__).parent.parent/"results/fuzz.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS); writer.writeheader(); writer.writerows(rows)
    for row in rows: print(*row.values(), sep="\t")
    sys.exit("\n".join(map(str, wrong)) or 0)
