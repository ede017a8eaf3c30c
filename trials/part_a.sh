rm -f /tmp/go; . .gpu/setup.sh; mkdir -p /tmp/r/runs; touch /tmp/machine.lock
cp -r $PWD /tmp/tree; cd /tmp/tree; export PYTHONPATH=/tmp/tree:/tmp/site
setsid nohup nice -n 10 bash .gpu/shared.sh ${P:-python3} .gpu/e2e.py --photos ${PH:-/tmp/d/photos} --output /tmp/r/e2e.json $TINY > /tmp/r/e2e.log 2>&1 < /dev/null &
sleep 1; ls /tmp/site | head -3
