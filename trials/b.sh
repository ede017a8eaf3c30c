START=$(date +%s); . .gpu2/setup.sh; P=${P:-python3}; R=/tmp/r; mkdir -p $R; CD=${CD:-/tmp/d/cifar10}; LIMIT=${LIMIT:-462}; HARD=${HARD:-472}
t() { echo $(( $(date +%s) - START )); }
pack() { tar -C $R -czf $OUT/p.tmp --exclude=checkpoints --exclude=tensorboard --exclude='*.f16' . 2>/dev/null; mv $OUT/p.tmp $OUT/b.tar.gz; }
( while sleep 20; do pack; done ) & BG=$!
date +%s.%N > $R/began
( $P -m reco_fast.train cifar10 --data.path $CD/train --data.val-path $CD/test --eval.every ${EV:-40} --run.log-every 100 --run.dir $R/record $X 2>&1 | python3 -uc 'import sys, time; [print(round(time.time(), 1), line, end="", flush=True) for line in sys.stdin]' > $R/record.log; date +%s.%N > $R/ended ) & A=$!
while kill -0 $A 2>/dev/null && [ $(t) -lt $LIMIT ]; do sleep 0.3; done
echo trained $(t); kill -0 $A 2>/dev/null && { pkill -TERM -f reco_fast.train; sleep 4; }; pack
$P .gpu2/half.py $R/record /tmp/w.f16 && split -b 15500000 -d /tmp/w.f16 $OUT/record.f16.; echo weights $(t)
part() { need=$1; n=$2; shift 2; left=$(( HARD - $(t) )); [ $left -lt $need ] && { echo no $n: $left; return; }; timeout $left "$@" > $R/$n.log 2>&1; pack; echo $n $(t); tail -n 2 $R/$n.log | cut -c1-300; }
part 30 step18 $P .gpu2/step.py cifar10 $R/step18.json $Y
part 70 step50 $P .gpu2/step.py imagenet100 $R/step50.json ${Z:---train.batch-size 256}
part 25 gluon timeout 60 $P .gpu2/bench_gluon.py --output $R/gluon.json --seconds 40 $GL
kill $BG; pack; echo end $(t)
grep -h kNN $R/record.log | cut -c1-100; tail -n 4 $R/record.log | cut -c1-170; cat $R/norms.log; for f in tests-method tests-views; do grep -v nvjpeg $R/$f.log | tail -n 14 | cut -c1-150; done; tail -n 8 $R/gluon.log | cut -c1-250; ls -la $OUT
