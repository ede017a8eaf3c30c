START=$(date +%s); t() { echo $(( $(date +%s) - START )); }
. .gpu2/setup.sh; P=${P:-python3}; R=/tmp/r; mkdir -p $R; CD=${CD:-/tmp/d/cifar10}; LIMIT=${LIMIT:-345}
rm -rf /tmp/tree2; cp -r $PWD /tmp/tree2; cd /tmp/tree2; export PYTHONPATH=/tmp/tree2:/tmp/site OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4; ls $CD; echo unpacked $(t)
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard --exclude='*.f16' . 2>/dev/null; mv $OUT/p.tmp $OUT/b.tar.gz; }
( while sleep 20; do pack; done ) & BG=$!
$P .gpu2/decode.py $CD /tmp/cifar.npz $EACH > $R/decode.log 2>&1 &
D="--data.path $CD/train --data.val-path $CD/test --data.workers 4 --run.log-every ${LOG:-100} $X"
run() { n=$1; shift; ( export TORCHINDUCTOR_CACHE_DIR=/tmp/c/$n/i TRITON_CACHE_DIR=/tmp/c/$n/t CHECK_OUT=$R/$n-check; $P .gpu2/checked.py cifar10 $D --run.dir $R/$n --eval.every ${EV:-25} --train.epochs ${EP:-100} --optim.lr 0.03 $*; $P .gpu2/space.py /tmp/cifar.npz $R/$n ) > $R/$n.log 2>&1 & PIDS="$PIDS $!"; }
DEMO="--data.min-scale 0.08 --model.query-norm split"; HALF="--loss.mix-share 0.5 --loss.mix-within --loss.keys weak"
export CHECK=${CHECK:-1500}
run moco-demo --loss.objective moco $DEMO --optim.warmup-epochs 0 --optim.decay-all
run half-demo $HALF $DEMO
run half $HALF
export CHECK=${CHECK8:-300}
( export TORCHINDUCTOR_CACHE_DIR=/tmp/c/whole/i TRITON_CACHE_DIR=/tmp/c/whole/t CHECK_OUT=$R/whole-check; $P .gpu2/checked.py cifar10 $D --run.dir $R/whole --train.epochs 200 --train.max-steps ${MAX8:-310} > $R/whole.log 2>&1 ) &
live() { a=0; for p in $PIDS; do kill -0 $p 2>/dev/null && a=$((a+1)); done; echo $a; }
while [ $(live) != 0 ] && [ $(t) -lt $LIMIT ]; do sleep 0.5; done
echo trained $(t), left $(live); pkill -f checked.py; pkill -f pytest; kill $BG; sleep 1
tar -C / -cJf $OUT/cache.tar.xz tmp/c/half-demo tmp/c/moco-demo 2>/dev/null & for n in moco-demo half-demo half; do $P .gpu2/half.py $R/$n /tmp/$n.f16 > /dev/null; tail -c 15500000 /tmp/$n.f16 > /dev/null; done; wait $!; pack; echo end $(t)
for f in moco-demo half-demo half; do echo $f; grep kNN $R/$f.log | cut -c1-60; tail -n 1 $R/$f.log | cut -c1-220; grep train $R/$f/metrics.jsonl | tail -n 1 | grep -o '"epoch": [0-9.]*\|"images_per_second": [0-9]*\|"step_ms_p50": [0-9.]*' | tr '\n' ' '; done
for f in $R/*check*.json; do echo $f; tr -d '\n ' < $f | cut -c1-900; echo; done; grep -v nvjpeg $R/tests.log | tail -n 12 | cut -c1-170; ls -la $OUT
