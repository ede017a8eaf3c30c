# sourced: unpack what travelled, once
export PYTHONUNBUFFERED=1 RECO_FAST_TEST_DATA=/tmp/d PYTHONPATH=$PWD:/tmp/site TORCHINDUCTOR_CACHE_DIR=/tmp/ic TRITON_CACHE_DIR=/tmp/tc
G=$PWD/.gpu2; mkdir -p /tmp/site /tmp/d /tmp/ic /tmp/tc
( [ -f $G/site.tar.xz ] && [ ! -f /tmp/site/.done ] && tar -C /tmp/site -xJf $G/site.tar.xz && touch /tmp/site/.done ) &
( [ -f $G/lightly.tar.xz ] && tar -C /tmp/site -xJf $G/lightly.tar.xz ) &
( [ -f $G/cifar.tar.xz ] && [ ! -d /tmp/d/cifar10 ] && tar -C /tmp/d -xJf $G/cifar.tar.xz ) &
( [ -f $G/cache.tar.xz ] && tar -C / -xJf $G/cache.tar.xz ) &
( [ -f $G/photos.tar ] && mkdir -p /tmp/d/photos0 /tmp/d/photos/all && tar -C /tmp/d/photos0 -xf $G/photos.tar && for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do for f in /tmp/d/photos0/*; do ln -sf $f /tmp/d/photos/all/$i-$(basename $f); done; done ) &
wait
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
