"Properties of splits on any patients, and published data sets from the command."
import json

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from test_cli import SMALL_2D, complaint, pcrl

from pcrl.cases import Cases, crossing_patients, split_by_patient
from pcrl.radiographs import CHEST14, chest14_cases
from pcrl.splits import RATIOS, by_ratio, read_split, split_id, use_split, write_split

people = st.lists(st.text("abc01é ,\"'", min_size=1, max_size=3), min_size=1, max_size=60)


@st.composite
def sets(draw):
    "Cases of any task, patients and labels, with a split of their own."
    patients = draw(people)
    n, kind, seed = len(patients), draw(st.sampled_from(["labels", "classes", "masks"])), draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((n, 3)) < 0.1, np.nan, rng.random((n, 3)) < [0.5, 0.2, 0.02]).astype(np.float32)
    targets = dict(labels=labels, classes=rng.integers(0, 4, n), masks=[None] * n)[kind]
    split = split_by_patient(patients, draw(st.sampled_from([(0.7, 0.1, 0.2), (1, 0, 0), (0.5, 0.5, 0)])), seed, None if kind == "masks" else targets)
    return Cases("any", 2, "segment" if kind == "masks" else "classify", list(range(n)), targets, ["a", "b", "c"] if kind == "labels" else list("wxyz"), patients, split)


@settings(max_examples=100, deadline=None)
@given(sets(), st.integers(0, 5))
def test_no_patient_crosses_and_smaller_shares_lie_in_larger_ones(cases, seed):
    assert not crossing_patients(cases)
    train = cases.part("train")
    if not len(train): return
    labelled = set()
    for share in (*RATIOS.values(), 0.7, 1.0):
        few = cases.take_labelled(share, seed).part("train")
        assert labelled <= set(few.names) and len(few)
        assert not set(few.patients) & {p for p, name in zip(train.patients, train.names) if name not in set(few.names)}
        assert abs(len(few) - share * len(train)) <= max(np.unique(train.patients, return_counts=True)[1])
        labelled = set(few.names)
    assert labelled == set(train.names)
    for ratio in RATIOS:
        dealt = by_ratio(cases, ratio, seed)
        assert not crossing_patients(dealt) and dealt.split == by_ratio(cases, ratio, seed).split
        assert len(dealt.part("unlabelled")) + len(dealt.part("train")) == len(train)
        assert [s for s in dealt.split if s in ("valid", "test")] == [s for s in cases.split if s in ("valid", "test")]


@settings(max_examples=50, deadline=None)
@given(cases=sets(), ratio=st.sampled_from(list(RATIOS)))
def test_a_split_survives_its_file(cases, ratio, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    if not cases.split.count("train"): return
    dealt = by_ratio(cases, ratio)
    name = write_split(dealt, path, ratio, 0)
    again = use_split(cases, path)
    assert (again.split, again.names, again.patients, split_id(again)) == (dealt.split, dealt.names, dealt.patients, name)
    assert read_split(path)[1].set_index("case").patient[dealt.names].tolist() == dealt.patients


@settings(max_examples=100, deadline=None)
@given(people, st.integers(0, 99))
def test_shares_are_met_as_nearly_as_patients_allow(patients, seed):
    split, largest = split_by_patient(patients, (0.7, 0.1, 0.2), seed), np.unique(patients, return_counts=True)[1].max()
    for part, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)): assert abs(split.count(part) - share * len(patients)) <= 2 * largest


@pytest.fixture(scope="module")
def xrays(tmp_path_factory):
    "ChestX-ray14 as NIH ships it, of 40 patients with two radiographs each; Mass is a bright square."
    root, rng = tmp_path_factory.mktemp("chest") / "ChestX-ray14", np.random.default_rng(0)
    (root / "images_001" / "images").mkdir(parents=True)
    rows = [(f"{p:08}_{k:03}.png", "Mass|Edema" if (p + k) % 3 == 0 else "No Finding", p) for p in range(1, 41) for k in range(2)]
    for name, findings, _ in rows:
        grey = rng.integers(0, 120, (72, 64), np.uint8)
        if findings != "No Finding": grey[20:40, 20:40] += 120
        Image.fromarray(grey).save(root / "images_001" / "images" / name)
    pd.DataFrame(rows, columns=["Image Index", "Finding Labels", "Patient ID"]).to_csv(root / "Data_Entry_2017_v2020.csv", index=False)
    (root / "train_val_list.txt").write_text("\n".join(name for name, _, p in rows if p <= 30))
    (root / "test_list.txt").write_text("\n".join(name for name, _, p in rows if p > 30))
    return root


def test_the_papers_protocol_from_the_command(xrays, tmp_path):
    "Deal 6:4, pretrain on the six without labels, finetune on the four."
    file, pretrained, tuned = tmp_path / "split.csv", tmp_path / "pretrained", tmp_path / "tuned"
    said = pcrl("split", xrays, "--out", file, "--dims", 2, "--ratio", "6:4")
    dealt = use_split(chest14_cases(xrays), file)
    assert split_id(dealt) in said and not crossing_patients(dealt) and dealt.split.count("unlabelled") > dealt.split.count("train")
    pcrl("pretrain", xrays, "--out", pretrained, "--split", file, "--epochs", 1, *SMALL_2D)
    store = pd.read_csv(tmp_path / "pretrained-store" / "manifest.csv")
    assert set(store.volume) == set(dealt.part("unlabelled").names)
    assert store.patient.nunique() == len(set(dealt.part("unlabelled").patients))
    pcrl("finetune", xrays, "--out", tuned, "--split", file, "--init", pretrained, "--cache", tmp_path / "cache", "--epochs", 1, "--repeats", 1, "--dims", 2, "--size", 64, "--bs", 4)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == sum(s != "unlabelled" for s in dealt.split)
    config = json.loads((tuned / "config.json").read_text())
    assert config["labels"] == CHEST14 and split_id(dealt) in config["data"]


def test_sets_and_splits_that_do_not_fit_get_one_sentence(xrays, tmp_path):
    file = tmp_path / "split.csv"
    pcrl("split", xrays, "--out", file, "--dims", 2, "--share", 0.5)
    assert "exists already" in complaint("split", xrays, "--out", file, "--dims", 2)
    assert "give dims 2" in complaint("split", xrays, "--out", tmp_path / "x.csv")
    assert "there is no ratio 1:1" in complaint("split", xrays, "--out", tmp_path / "x.csv", "--dims", 2, "--ratio", "1:1")
    assert "give dims 2" in complaint("pretrain", xrays, "--out", tmp_path / "run")
    file.write_text(file.read_text().replace(",train", ",test"))
    for command in ("pretrain", "finetune"): assert "was changed" in complaint(command, xrays, "--out", tmp_path / "run", "--split", file, "--dims", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["split.csv"]
