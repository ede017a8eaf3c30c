START=$(date +%s); . .gpu/setup.sh; P=${P:-python3}; R=/tmp/r; rm -rf $R/*; CD=${CD:-/tmp/d/cifar10}; LIMIT=${LIMIT:-312}
export TORCHINDUCTOR_COMPILE_THREADS=4 OMP_NUM_THREADS=2
t() { echo $(( $(date +%s) - START )); }
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard . 2>/dev/null; mv $OUT/p.tmp $OUT/c.tar.gz; }
( while sleep 15; do pack; done ) & BG=$!
PIDS=""
run() { n=$1; shift; bash -c "$P .gpu/variant.py cifar10 --data.path $CD/train --data.val-path $CD/test --data.loader dali --data.workers 3 --run.log-every ${EV:-50} --optim.warmup-epochs 2 --run.dir $R/$n $* $X && $P .gpu/probe.py $R/$n /tmp/cifar.npz" > $R/$n.log 2>&1 & PIDS="$PIDS $!"; }
M="--loss.objective moco --train.epochs ${ME:-30} --eval.every ${MV:-15}"; C="--train.epochs ${CE:-40} --eval.every ${CV:-20}"
run X0 $C
AREA=0.08 SPLIT=8 run X1 $C
run X2 $M
AREA=0.08 SPLIT=8 run X3 $M
$P .gpu/decode.py $CD /tmp/cifar.npz $EACH; echo decoded $(t)
while :; do a=0; for p in $PIDS; do kill -0 $p 2>/dev/null && a=$((a+1)); done; [ $a = 0 ] && break; [ $(t) -gt $LIMIT ] && break; sleep 0.5; done
echo trained $(t), left $a; pkill -TERM -f variant.py; sleep 2; kill $BG; pack; echo end $(t)
for f in X0 X1 X2 X3; do echo $f; grep 'kNN\|"run"' $R/$f.log | cut -c1-330; tail -n 1 $R/$f.log | cut -c1-160; done
