#!/usr/bin/env bash
# One SLURM node, one process, all of its devices; submit from the checkout, with logs below the current folder:
#   sbatch launch/slurm.sh --config=imagenet_carp --config.data.root=DIR --workdir=DIR
# Stopped at the time limit it saves and leaves; the same command resumes.
#SBATCH --job-name=protojax
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=protojax-%j.log
set -euo pipefail
# sbatch runs a copy of this file: the checkout is where it was submitted from.
exec srun --ntasks=1 "${SLURM_SUBMIT_DIR:?submit with sbatch}/launch/local.sh" "$@"
