#!/usr/bin/env bash
# All hosts of a TPU-VM pod slice, with the checkout at ~/protojax on each of them:
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh --config=inat --config.data.root=gs://BUCKET/tfds --workdir=/mnt/shared/run
set -euo pipefail
printf -v arguments ' %q' "$@"
command="cd ~/protojax && PROTOJAX_TPU_POD=1 launch/local.sh$arguments"
exec gcloud compute tpus tpu-vm ssh "${TPU:?name of the TPU VM}" --zone="${ZONE:?its zone}" --worker=all --command="$command"
