#!/usr/bin/env bash
# Measures the CPU figures of profiling.md and loader.md again, into docs/results, and prints their tables:
#     bash docs/measure.sh CIFAR10_TRAIN_FOLDER PHOTOGRAPHS_FOLDER
# About a quarter of an hour on two cores, which must have nothing else to do. Needs pip install -e '.[examples,profile,dali]'.
set -euo pipefail
cifar=$(realpath "$1") photographs=$(realpath "$2")
cd "$(dirname "$0")/.."
results=$PWD/docs/results work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
profiling="${PYTHON:-python} -m reco_fast.profiling"
resnet18="--model.arch resnet18 --data.image-size 32 --train.batch-size 128 --model.bank-size 16384"
once="--rounds 3 --steps 1 --warmup 1"

keep() { # NAME FILE: the JSON of a part that is done, and how long all has taken
    cp "$2" "$results/$1.json"
    echo "== $1, after $SECONDS s"
}

$profiling.benchmarks.step $resnet18 $once --against naive,lightly,supervised --data.path "$cifar" --output "$work/step"
keep step-resnet18-2cores "$work/step/step.json"

naive() { # NAME OPTION...
    $profiling.benchmarks.step $resnet18 $once --against naive --output "$work/$1" "${@:2}"
    keep "step-resnet18-2cores-$1" "$work/$1/step.json"
}
naive compiled --train.compile
for isa in AVX512 AVX2; do # as a CPU without AMX and AVX512_BF16, on which `auto` takes float32
    export ONEDNN_MAX_CPU_ISA=${isa/512/512_CORE} MKL_ENABLE_INSTRUCTIONS=$isa ATEN_CPU_CAPABILITY=${isa,,}
    naive $isa
done
unset ONEDNN_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS ATEN_CPU_CAPABILITY

$profiling.benchmarks.growth $resnet18 $once --output "$work/growth"
keep growth-resnet18-2cores "$work/growth/growth.json"
cp "$work/growth/growth.png" docs/images/growth.png

loader() { # NAME FOLDER OPTION...
    $profiling.benchmarks.loader --data.path "$2" "${@:3}" | tee "$work/loader"
    tail -n 1 "$work/loader" >"$work/loader.json"
    keep "$1" "$work/loader.json"
}
small="--image-size 32 --batch-size 256 --batches 12"
loader loader-cifar10-32px-2cores "$cifar" $small
class=$(find "$cifar" -mindepth 1 -maxdepth 1 -type d | sort | head -n 1) # its 5,000 images have all been read, and the loader has changed over to what it keeps, in the warm-up
loader loader-cifar10-32px-later-epochs-2cores "$class" $small --warmup 40
loader loader-photographs-224px-2cores "$photographs" --image-size 224 --batch-size 32 --batches 10
