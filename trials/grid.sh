# For a card, second call (the first brings DALI: a.sh): four runs of MoCo, crops from 0.2 or 0.08, student's norms whole or in 8 groups,
# then kNN before and behind the projector; then ResNet-50's step in memory with its kernels. About 330 s.
START=$(date +%s); . .gpu2/setup.sh; P=${P:-python3}; R=/tmp/r; mkdir -p $R; CD=${CD:-/tmp/d/cifar10}; LIMIT=${LIMIT:-330}
export TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=2
t() { echo $(( $(date +%s) - START )); }
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard . 2>/dev/null; mv $OUT/p.tmp $OUT/b.tar.gz; }
( while sleep 15; do pack; done ) & BG=$!
$P .gpu2/decode.py $CD /tmp/cifar.npz & D=$!
run() { n=$1; shift; TORCHINDUCTOR_CACHE_DIR=/tmp/c$n/i TRITON_CACHE_DIR=/tmp/c$n/t bash -c "$P .gpu2/variant.py cifar10 --data.path $CD/train --data.val-path $CD/test --data.workers 4 --run.log-every 100 --run.dir $R/$n --loss.objective moco --train.epochs ${EP:-60} --eval.every 20 $* $X; $P .gpu2/space.py /tmp/cifar.npz $R/$n" > $R/$n.log 2>&1 & PIDS="$PIDS $!"; }
AREA=0.2 SPLIT=0 run G1; AREA=0.08 SPLIT=0 run G2; AREA=0.2 SPLIT=8 run G3; AREA=0.08 SPLIT=8 run G4
while :; do a=0; for p in $PIDS; do kill -0 $p 2>/dev/null && a=$((a+1)); done; [ $a = 0 ] && break; [ $(t) -gt $LIMIT ] && break; sleep 0.5; done
echo trained $(t), left $a; pkill -f variant.py; sleep 2; kill $BG; pack
for f in G1 G2 G3 G4; do echo $f; grep kNN $R/$f.log | cut -c1-60; tail -n 1 $R/$f.log | cut -c1-200; done
