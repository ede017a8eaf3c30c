START=$(date +%s); . .gpu/setup.sh; P=${P:-python3}; R=/tmp/r; rm -rf $R/*; CD=${CD:-/tmp/d/cifar10}; EP=${EP:-16}; LIMIT=${LIMIT:-170}; AB=${AB:-/tmp/ab}
export TORCHINDUCTOR_COMPILE_THREADS=3 OMP_NUM_THREADS=2
t() { echo $(( $(date +%s) - START )); }
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard . 2>/dev/null; mv $OUT/p.tmp $OUT/b.tar.gz; }
( while sleep 15; do pack; done ) & BG=$!
PIDS=""
go() { n=$1; shift; "$@" > $R/$n.log 2>&1 & PIDS="$PIDS $!"; }
run() { n=$1; shift; go $n bash -c "$P .gpu/variant.py cifar10 --data.path $CD/train --data.val-path $CD/test --data.loader dali --data.workers 2 --run.log-every 100 --optim.warmup-epochs 1 --train.epochs $EP --eval.every $EP --run.dir $R/$n $* $X && $P .gpu/probe.py $R/$n /tmp/cifar.npz"; }
AREA=0.08 run MD --loss.objective moco --train.batch-size 512 --optim.lr 0.03
$P .gpu/decode.py $CD /tmp/cifar.npz $EACH; echo decoded $(t)
go D1 $P .gpu/demo.py /tmp/cifar.npz D1 --epochs 200 --stop ${D1:-30} $Y
go D2 $P .gpu/demo.py /tmp/cifar.npz D2 --epochs $EP --stop $EP --warmup 1 --every $EP $Y
go D3 $P .gpu/demo.py /tmp/cifar.npz D3 --epochs $EP --stop $EP --warmup 1 --every $EP --batch 256 --lr 0.12 --area 0.2 --student-groups 1 --mlp $Z
go D4 $P .gpu/demo.py /tmp/cifar.npz D4 --epochs $EP --stop $EP --warmup 1 --every $EP --batch 256 --lr 0.03 --area 0.2 --student-groups 1 --mlp $Z
while :; do a=0; for p in $PIDS; do kill -0 $p 2>/dev/null && a=$((a+1)); done; [ $a = 0 ] && break; [ $(t) -gt $LIMIT ] && break; sleep 0.5; done
echo trained $(t), left $a; pack
for p in $PIDS; do kill -STOP $p 2>/dev/null; done; pkill -STOP -f variant.py; touch /tmp/go
for n in 18 50; do for i in $(seq 1 60); do [ "$(grep -c ready $AB/ab$n.log)" = 2 ] || break; touch /tmp/go$n; [ -f $AB/ab$n.json.done ] && break; sleep 0.5; done; done
for p in $PIDS; do kill -9 $p 2>/dev/null; done; pkill -9 -f variant.py; pkill -9 -f ab.py
cp $AB/* $R/ 2>/dev/null; kill $BG; pack; echo end $(t)
for f in $R/D*.log; do grep -h '"knn"' $f | cut -c1-110 | tail -n +2; tail -n 1 $f | cut -c1-200; done; for f in MD; do echo $f; grep 'kNN\|"run"' $R/$f.log | cut -c1-300; tail -n 1 $R/$f.log | cut -c1-200; done; tail -n 2 -q $R/ab*.log | cut -c1-700
