import sys; sys.path.insert(0,"/tmp/t")
from cells import NB
n=NB("/work/main/nbs/02a_folders.ipynb")
n.sub("f970c418",("""    return OnDisk(masks.items, read_mask, cache, spacing=spacing, values=number), [f"class {v}" for v in number]""","""    if any(v != k for v, k in number.items()): masks = OnDisk(masks.items, read_mask, cache, spacing=spacing, values=number)
    return masks, [f"class {v}" for v in number]"""))
n.save()
