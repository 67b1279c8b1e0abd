"What a killed process leaves of a mask, and what reading tells of a patient."
import logging, os, subprocess, sys, traceback
from pathlib import Path

import numpy as np
import pytest

from fuzz import PATIENT, dicom
from pcrl.volumes import Volume, VolumeError, find_images, read_header, read_volume, write_volume

WRITER = """
import sys
import numpy as np
from pcrl.volumes import Volume, write_volume
noise = np.random.default_rng(0).random((128, 128, 128), np.float32)
like = Volume(noise, (1, 1, 1), np.eye(4), None, np.eye(4))
print("ready", flush=True)
while True: write_volume(noise, like, sys.argv[1])
"""


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, suffix):
    path, old = tmp_path/f"map{suffix}", np.ones((4, 4, 4), np.float32)
    write_volume(old, Volume(old, (1, 1, 1), np.eye(4), None, np.eye(4)), path)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    writer.stdout.readline()
    while not list(tmp_path.glob(".map*/*")): pass  # it has begun the new file
    writer.kill(); writer.wait(); writer.stdout.close()
    assert list(tmp_path.glob(".map*/*")), "the kill came too late to test anything"
    assert find_images(tmp_path, 3) == [path]
    assert read_volume(path).array.shape in (old.shape, (128, 128, 128))


def test_nothing_of_a_patient_is_told(tmp_path, capfd, recwarn, caplog):
    "Neither by what is read nor by what is refused: the messages, tracebacks, warnings, logs and printed forms."
    caplog.set_level(logging.DEBUG)
    noise = np.random.default_rng(0).integers(0, 999, (3, 8, 8)).astype(np.int16)
    for k in range(3): dicom(tmp_path/"good"/f"{k}", noise[k], k); dicom(tmp_path/"bad"/f"{k}", noise[k], k)
    for k, (old, new) in enumerate(((b"DOE^JOHN", b"DOE^JANE"), (b"PN", b"DS"), (b"DS", b"PN"))):
        file = tmp_path/"bad"/str(k)
        file.write_bytes(file.read_bytes().replace(old, new))
    scan, told = read_volume(tmp_path/"good"), []
    assert scan.patient == PATIENT
    for read in (read_volume, read_header, lambda p: find_images(p, 3)):
        for path in (tmp_path/"good", tmp_path/"bad", *sorted((tmp_path/"bad").iterdir())):
            try: told.append(repr(read(path)) + str(getattr(read(path), "skipped", "")) if path.is_dir() or read is not read_volume else "")
            except VolumeError: told.append(traceback.format_exc())
    told += [repr(scan), *capfd.readouterr(), caplog.text, *(str(w.message) for w in recwarn)]
    assert any("VolumeError" in t for t in told) and not [t for t in told if "DOE" in t or "1.2.3" in t or "1.2.9" in t]


def test_a_folder_of_links_ends(tmp_path):
    "Links that lead back, to each other or nowhere."
    (tmp_path/"a"/"b").mkdir(parents=True)
    for link, to in (("a/b/up", tmp_path), ("a/self", "self"), ("a/one", "two"), ("a/two", "one"), ("a/dead.nii", "nowhere.nii")):
        os.symlink(to, tmp_path/link)
    assert find_images(tmp_path, 3) == [] and find_images(tmp_path, 2) == []
    for name in ("a/self", "a/dead.nii"):
        with pytest.raises(VolumeError, match="does not exist"): read_volume(Path(tmp_path, name))
