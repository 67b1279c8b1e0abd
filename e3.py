import sys; sys.path.insert(0,"/tmp/t")
from cells import NB
n=NB("/work/main/nbs/02a_folders.ipynb")
ids=[c['id'] for c in n.d['cells'] if 'own, fine = folder_cases(root, 3, cache' in ''.join(c['source'])]; assert len(ids)==1
n.sub(ids[0],("""    test_eq((own.task, own.classes, own.images[0].shape, own.targets[0].shape), ("segment", ["class 1"], (1, 8, 10, 12), (8, 10, 12)))
""","""    test_eq(len([*own.targets]), len([*(Path(d) / "cache").rglob("*.npy")]))              # each mask is kept once
    test_eq((own.task, own.classes, own.images[0].shape, own.targets[0].shape), ("segment", ["class 1"], (1, 8, 10, 12), (8, 10, 12)))
"""))
n.sub("f970c418",('''    "Masks on disk with their values renumbered 1, 2, ..., and the values' names: a mask of 0 and 255 has one class."''','''    "Masks on disk, their values renumbered 1, 2, ... where they are others, and the values' names: a mask of 0 and 255 has one class."'''))
n.save()
n=NB("/work/main/nbs/01p_preparation.ipynb")
ids=[c['id'] for c in n.d['cells'] if 'that became 1, 2, ... |' in ''.join(c['source'])]; assert len(ids)==1
n.sub(ids[0],("the values of the masks as they were given, that became 1, 2, ... |","the values of the masks as they were given, that became 1, 2, ...; null: they were that |"))
n.save()
