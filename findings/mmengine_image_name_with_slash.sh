#!/bin/sh
# MMEngine's Visualizer: an image whose name has a slash is not written, without an error or a warning.
#
# Version:   mmengine 0.10.7, opencv-python-headless 4.13.0.92. Python 3.10 or newer.
# Behaviour: with LocalVisBackend, the default, add_image("train/rgb", image) writes nothing: the name is taken as a path below
#            vis_image/, that folder is not made, and the False that cv2.imwrite returns is dropped. add_image("rgb", image) is written,
#            and add_scalar("train/loss", 1.0) too. TensorboardVisBackend takes the same name and shows it as a group.
# Seen:      the lines below "expected".
# Why it matters: names with a slash are how TensorBoard groups; a training that logs pictures that way has none left when it is over.
#
# Installs into a temporary folder, which it removes. Exit code 0: as stated; 1: the behaviour changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==${TORCH:-2.13.0}" numpy addict yapf termcolor rich matplotlib pyyaml
"$folder/venv/bin/python" -m pip install --quiet --no-deps "mmengine==${MMENGINE:-0.10.7}" "opencv-python-headless==4.13.0.92"

cat > "$folder/try.py" <<'PROGRAM'
import logging
import sys
import warnings
from pathlib import Path

import numpy as np

folder = Path(sys.argv[1])
with warnings.catch_warnings(record=True):  # of the import
    warnings.simplefilter("always")
    from mmengine.visualization import Visualizer

logged = []
logging.Handler.handle = lambda self, record: logged.append(record.getMessage())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    visualizer = Visualizer(vis_backends=[{"type": "LocalVisBackend"}], save_dir=str(folder))
    image = np.zeros((8, 8, 3), np.uint8)
    visualizer.add_image("rgb", image, step=1)
    visualizer.add_image("train/rgb", image, step=1)
    visualizer.add_scalar("train/loss", 1.0, step=1)
for file in sorted(file for file in folder.rglob("*") if file.is_file()):
    print("written:", file.relative_to(folder).as_posix())
print("scalars:", *(folder / "vis_data/scalars.json").read_text().split())
print("said of the image:", [text for text in (*logged, *(str(w.message) for w in said)) if "rgb" in text or "image" in text])
PROGRAM

cat > "$folder/expected" <<'LINES'
written: vis_data/scalars.json
written: vis_data/vis_image/rgb_1.png
scalars: {"train/loss": 1.0, "step": 1}
said of the image: []
LINES

"$folder/venv/bin/python" "$folder/try.py" "$folder/log" > "$folder/seen"
cat "$folder/seen"
if ! diff "$folder/expected" "$folder/seen"; then
    echo "changed: no longer as stated above" >&2
    exit 1
fi
echo "as stated, mmengine $("$folder/venv/bin/python" -c 'import mmengine; print(mmengine.__version__)')"
