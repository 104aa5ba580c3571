#!/usr/bin/env bash
# Draws the README's pictures of CIFAR-10 runs, the probe and the evaluation again: an hour and a half on two cores.
#
#     bench/pictures.sh CIFAR10      # a folder with train/<class>/*.jpg and test/<class>/*.jpg
#
# The runs stay in runs/; stopped, they go on where they were. Needs fastdcgan installed (`.venv/bin/pip install -e .`).
set -euo pipefail
cifar=$(realpath "${1:?name the folder with CIFAR-10}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fastdcgan=${FASTDCGAN:-.venv/bin/fastdcgan}
python=${PYTHON:-.venv/bin/python}
run=runs/cifar
out=bench/results/pictures
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

$fastdcgan train "$cifar/train" --image-size 32 --steps 12000 --run-dir $run --resume
$fastdcgan train "$cifar/train/automobile" --image-size 64 --steps 3500 --run-dir runs/automobiles --resume

images=()
for class in airplane automobile bird frog horse ship; do images+=("$cifar/test/$class/0000.jpg"); done
$fastdcgan sample $run --count 36 --out $out/sample.png
$fastdcgan sample runs/automobiles --count 25 --out $out/sample-64.png
$fastdcgan interpolate $run --seeds 3,8 --steps 7 --out $out/interpolate.gif
$fastdcgan arithmetic $run --plus 1,2,3 --minus 4,5,6 --plus 7,8,9 --out $out/arithmetic.png
$fastdcgan invert $run "${images[@]}" --out "$work/invert"
$fastdcgan inpaint $run "${images[@]}" --box 10,10,12,12 --out "$work/inpaint"
$fastdcgan denoise $run "${images[@]}" --sigma 0.1 --add-noise --out "$work/denoise"
for name in invert inpaint denoise; do cp "$work/$name/sheet.png" $out/$name.png; done

# The settings of the probe were chosen on the 5,000 test images that it takes by itself: here it gets the others.
$python - "$cifar/test" "$work/test-unused" <<'PYTHON_END'
import sys
from pathlib import Path
from fastdcgan.apps.image_sets import shuffled
from fastdcgan.data.source import FolderSource
test = FolderSource(Path(sys.argv[1]))
for i in shuffled(len(test), 0)[5000:]:
    link = Path(sys.argv[2], test.names[i])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path(sys.argv[1], test.names[i]))
PYTHON_END
$fastdcgan probe $run --data "$cifar/train" --test-data "$work/test-unused" --out "$work/probe.json"
$fastdcgan evaluate $run --data "$cifar/train" --out "$work/evaluate.json"
cp "$work"/{probe,evaluate,evaluate-nearest}.png $out/
for name in probe evaluate; do  # without this machine's folders
    sed -e "s|$cifar/|cifar10/|; s|$work/|cifar10/|" "$work/$name.json" > bench/results/$name-cifar10.json
done
