"A finetuned run on files that it never saw, by the command as a user types it."
import json, os, shutil, subprocess, sys
from pathlib import Path

import nibabel, numpy as np, pandas as pd, pytest
import SimpleITK as sitk
from PIL import Image
from typer.testing import CliRunner

from pcrl.cli import app
from pcrl.masks import measure_case
from test_cli import complaint, pcrl, slices  # noqa: F401, the last is a fixture


@pytest.fixture(scope="module")
def masks_run(kit, tmp_path_factory):
    "A short finetuning to masks of the hippocampus, at 3 mm so that whole CTs are quick."
    folder = tmp_path_factory.mktemp("hippocampus")
    for kind, theirs in (("images", "imagesTr"), ("masks", "labelsTr")):
        (folder / "own" / kind).mkdir(parents=True)
        for p in sorted((kit / "hippocampus" / theirs).glob("*.nii.gz"))[:10]: shutil.copy(p, folder / "own" / kind)
    pcrl("finetune", folder / "own", "--out", folder / "run", "--epochs", 1, "--crop", "16x32x32", "--width", 4, "--lr", 0.003,
         "--spacing", 3, 3, 3, "--repeats", 1)
    return folder / "run"


def here(*args):
    "The command in this process; its exit code."
    return CliRunner().invoke(app, [str(a) for a in args]).exit_code


def geometry(image):
    "Of a SimpleITK image: size, spacing, origin, direction."
    return image.GetSize(), np.round([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()], 3).tolist()


def series_image(folder):
    "A DICOM series as SimpleITK reads it."
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_the_run_says_how_its_images_were_prepared(masks_run):
    how = json.loads((masks_run / "config.json").read_text())["preparation"]
    assert (how["spacing"], how["window"], how["mask_values"], how["seen"]["spacing"]) == ([3, 3, 3], None, None, [[1, 1, 1], [1, 1, 1]])
    cases = pd.read_csv(masks_run / "cases.csv")
    assert set(cases["class"]) == {"class 1", "class 2"} and cases.case.str.endswith(".nii.gz").all() and cases.hd95.gt(0).all()
    assert pd.read_csv(masks_run / "test.csv").metric.tolist()[:4] == ["dice", "dice class 1", "dice class 2", "surface_dice"]


def test_a_run_is_measured_by_the_masks_that_predict_writes(masks_run, tmp_path):
    "The network sees 3 mm; what it is told of its test cases is true of masks on the files' own voxels, of 1 mm."
    own, told = masks_run.parent / "own", pd.read_csv(masks_run / "cases.csv")
    pcrl("predict", masks_run, *(own / "images" / name for name in told.case.unique()), "--out", tmp_path / "out")
    for name, rows in told.groupby("case"):
        mask, truth = (sitk.ReadImage(str(folder / name)) for folder in (tmp_path / "out", own / "masks"))
        found = measure_case(*map(sitk.GetArrayFromImage, (mask, truth)), 2, truth.GetSpacing()[::-1])
        np.testing.assert_allclose(rows[[*found]], found, atol=1e-6)
    assert "the files' own voxels; distances in mm" in (masks_run / "report.md").read_text()


def test_a_folder_of_dicom_series_to_masks_that_lie_on_their_images(masks_run, kit, tmp_path):
    "A CT, and two MRI series in one folder, one of them oblique, none seen before: each mask has its image's voxels and place, for SimpleITK and nibabel alike."
    mri = [kit / "formats" / "dicom_series" / f"prostatex0000_t2_{way}" for way in ("sag_oblique", "tra")]
    shutil.copytree(kit / "totalsegmentator_example" / "ct_dicom_series", tmp_path / "scans" / "patient" / "ct")
    (tmp_path / "scans" / "patient" / "mr").mkdir()
    for source in mri:
        for p in source.iterdir(): shutil.copy(p, tmp_path / "scans" / "patient" / "mr" / f"{source.name}-{p.name}")
    pcrl("predict", masks_run, tmp_path / "scans", "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    names = ["patient/ct.nii.gz", "patient/mr-series1.nii.gz", "patient/mr-series2.nii.gz"]
    assert sorted(table["mask"]) == names and table.run.nunique() == 1 and table.source.str.contains("series 2 of 2").sum() == 1
    images = [series_image(p) for p in (tmp_path / "scans" / "patient" / "ct", *mri)]
    masks = [sitk.ReadImage(str(tmp_path / "out" / name)) for name in names]
    assert geometry(masks[0]) == geometry(images[0])
    assert sorted(map(geometry, masks[1:])) == sorted(map(geometry, images[1:]))
    for name, mask in zip(names, masks):
        other, lps = nibabel.load(tmp_path / "out" / name), np.diag([-1, -1, 1])
        corner = [mask.GetWidth() - 1, mask.GetHeight() - 1, mask.GetDepth() - 1]
        for voxel in ([0, 0, 0], corner):
            np.testing.assert_allclose(other.affine[:3, :3] @ voxel + other.affine[:3, 3], lps @ mask.TransformIndexToPhysicalPoint(voxel), atol=1e-2)
        assert set(np.unique(other.dataobj)) <= {0, 1, 2} and (np.asarray(other.dataobj).T == sitk.GetArrayFromImage(mask)).all()
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 1000


def test_formats_stay_what_they_were_and_bad_files_are_skipped(masks_run, kit, tmp_path):
    "NIfTI, MHD and MHA in one call, a torn file among them, and a warning for intensities that no training image had."
    formats = kit / "formats"
    for name in ("ct_luna16_like.mhd", "ct_luna16_like.raw", "ct_luna16_like_compressed.mha"): shutil.copy(formats / "mhd_raw" / name, tmp_path / name)
    (tmp_path / "torn.nii.gz").write_bytes(next((formats / "nifti").glob("*.nii.gz")).read_bytes()[:100])
    inputs = [tmp_path / n for n in ("ct_luna16_like.mhd", "ct_luna16_like_compressed.mha", "torn.nii.gz")]
    said = pcrl("predict", masks_run, *inputs, "--out", tmp_path / "out", code=3)
    assert "lie outside of what the model saw" in said and "ct_luna16_like.mhd" in said and "1 skipped" in said
    assert {p.suffix for p in (tmp_path / "out").glob("ct_*")} >= {".mhd", ".mha"} and not list((tmp_path / "out").glob("torn*"))
    assert pd.read_csv(tmp_path / "out" / "skipped.csv").file.tolist() == [str(inputs[2])]
    masks = [sitk.ReadImage(str(tmp_path / "out" / p.name)) for p in inputs[:2]]
    for mask, source in zip(masks, inputs): assert geometry(mask) == geometry(sitk.ReadImage(str(source)))
    assert (sitk.GetArrayFromImage(masks[0]) == sitk.GetArrayFromImage(masks[1])).all()  # one volume in two formats
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    assert "holds predictions already" in complaint("predict", masks_run, *inputs, "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before
    assert here("predict", masks_run, inputs[2], "--out", tmp_path / "none") == 1


def test_two_repeats_predict_their_mean(slices, tmp_path):  # noqa: F811
    "Radiographs to probabilities: one run, another seed that drew other labelled cases, and a folder of both."
    folder = tmp_path / "labelled"
    shutil.copytree(slices / "images", folder / "images")
    names = sorted(p.name for p in (slices / "images").iterdir())
    pd.DataFrame(dict(image=names, split=["train"] * 12 + ["valid"] * 4 + ["test"] * 4, bright=[0, 1] * 10)).to_csv(folder / "labels.csv", index=False)
    assert not here("finetune", folder, "--out", tmp_path / "runs", "--dims", 2, "--size", 64, "--width", 4, "--epochs", 1, "--repeats", 2, "--labelled", 4)
    tables = []
    for run in ("runs/seed0", "runs/seed1", "runs"):
        assert not here("predict", tmp_path / run, slices / "images", "--out", tmp_path / "out" / run.replace("/", "-"))
        tables.append(pd.read_csv(tmp_path / "out" / run.replace("/", "-") / "predictions.csv"))
    assert len({t.run[0] for t in tables}) == 3 and all(len(t) == 20 for t in tables)
    a, b, both = (t["probability bright"].to_numpy() for t in tables)
    np.testing.assert_allclose(both, (a + b) / 2, atol=1e-6)
    assert np.abs(a - b).max() > 1e-4


def test_volumes_of_uneven_shapes_to_labels(kit, tmp_path):
    "Without --crop a sentence names it; with it the run keeps the shape, and predicts volumes of any other."
    files = sorted((kit / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:12]
    (tmp_path / "own" / "images").mkdir(parents=True)
    for p in files: shutil.copy(p, tmp_path / "own" / "images")
    pd.DataFrame(dict(image=[p.name for p in files], split=["train"] * 6 + ["valid"] * 3 + ["test"] * 3, odd=[0, 1] * 6)).to_csv(tmp_path / "own" / "labels.csv", index=False)
    command = ["finetune", tmp_path / "own", "--out", tmp_path / "run", "--width", 4, "--epochs", 1, "--repeats", 1]
    assert "--crop DxHxW" in complaint(*command)
    assert not here(*command, "--crop", "32x48x24")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preparation"]["size"] == [32, 48, 24]
    assert not here("predict", tmp_path / "run", kit / "ct_spleen_sample" / "sub-spleen2_ct.nii.gz", *files[:2], "--out", tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["probability odd"].between(0, 1).tolist() == [True] * 3


def test_masks_of_pictures_mean_what_the_training_masks_meant(slices, tmp_path):  # noqa: F811
    "Masks of 0 and 255 give masks of 0 and 255; a JPEG's mask is a PNG, beside one of the same name."
    own, names = tmp_path / "own", sorted((slices / "images").iterdir())
    (own / "images").mkdir(parents=True); (own / "masks").mkdir()
    for p in names:
        shutil.copy(p, own / "images" / p.name)
        Image.fromarray((np.asarray(Image.open(slices / "masks" / p.name)) > 0).astype(np.uint8) * 255).save(own / "masks" / p.name)
    assert not here("finetune", own, "--out", tmp_path / "run", "--dims", 2, "--crop", "64x64", "--width", 4, "--epochs", 8, "--lr", 0.01, "--repeats", 1)
    (tmp_path / "new").mkdir()
    shutil.copy(names[0], tmp_path / "new" / "a.png"); Image.open(names[0]).save(tmp_path / "new" / "a.jpg", quality=100)
    assert not here("predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "out", "--flips")
    masks = [np.asarray(Image.open(tmp_path / "out" / name)) for name in ("a.png", "a-2.png")]
    assert {frozenset(np.unique(m).tolist()) for m in masks} == {frozenset({0, 255})} and (masks[0] == masks[1]).mean() > 0.95


def test_a_prediction_cut_off_leaves_whole_files_or_none(masks_run, kit, tmp_path):
    "Killed while a mask is being written: what stands there can be read, and nothing half-written is under its name."
    shutil.copytree(kit / "formats" / "mhd_raw", tmp_path / "scans")
    script = f"""
import os, sys
from pcrl import cli, volumes
def half(xyz, affine, path):
    path.write_bytes(b"half"); os._exit(9)
volumes.WRITERS[".mha"] = half
sys.argv = ["pcrl", "predict", {str(masks_run)!r}, {str(tmp_path / "scans")!r}, "--out", {str(tmp_path / "out")!r}]
cli.app()
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1")).returncode == 9
    found = [p for p in (tmp_path / "out").iterdir() if p.is_file()]
    assert found and not any("compressed" in p.name for p in found)
    for p in found:
        if p.suffix == ".mhd": sitk.ReadImage(str(p))
