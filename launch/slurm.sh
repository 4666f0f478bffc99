#!/usr/bin/env bash
# A run on a Slurm cluster: a process per GPU, SIGTERM before the time is over, and back into the queue after exit code 75.
#
#   bash launch/slurm.sh [options] RECIPE --workdir DIR [arguments of jaxdraft run]
#
#   --nodes N (default 1)   --gpus N per node (default 8)   --time T (default 24:00:00)   --name NAME (default jaxdraft)
#   --requeues N            how often it goes back into the queue (default 20)
#   --dry-run               prints the sbatch command
#
# This checkout and DIR lie on a file system that all nodes share, and `EXTRAS=cuda bash launch/setup.sh` has run in it.
# sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT and the like from the environment. Watch, log and stop with Slurm's own:
#   squeue --me;  tail -f slurm-NAME-JOB.log;  scancel --signal=TERM JOB, so that the run saves; scancel JOB
#
# Example: SBATCH_PARTITION=gpu bash launch/slurm.sh --nodes 2 quickstart --workdir runs/quickstart
set -euo pipefail

# What runs on the first node. sbatch runs a copy of this file, in the top folder of the checkout.
if [[ "${1-}" == --batch ]]; then
    requeues=$2
    shift 2
    status=0
    srun --kill-on-bad-exit=1 bash launch/slurm.sh --task "$@" || status=$?
    ((status <= 200)) || exit $((status - 200))
    # 143: ended by SIGTERM before it could listen to it.
    if ((status == 75 || status == 143)) && ((${SLURM_RESTART_COUNT:-0} < requeues)); then
        printf 'slurm: interrupted (exit code %s): back into the queue\n' "$status"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
fi

# Each process. srun reports the highest exit code: that of an error must not be lower than the 75 of those it stopped.
if [[ "${1-}" == --task ]]; then
    shift
    trap : TERM # for jaxdraft, which gets it too
    status=0
    .venv/bin/jaxdraft run "$@" || status=$?
    ((status != 1 && status != 2)) || status=$((status + 200))
    exit "$status"
fi

source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
nodes=1 gpus=8 time=24:00:00 name=jaxdraft requeues=20
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --nodes) nodes=$(value "$@"); shift 2 ;;
        --gpus) gpus=$(value "$@"); shift 2 ;;
        --time) time=$(value "$@"); shift 2 ;;
        --name) name=$(value "$@"); shift 2 ;;
        --requeues) requeues=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *) break ;;
    esac
done
need_recipe "$@"
need sbatch "start this on a login node of the cluster"
cd -- "$root"
[[ -n "$dry_run" || -x .venv/bin/jaxdraft ]] || fail "there is no .venv here: EXTRAS=cuda bash launch/setup.sh makes it"
run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--time=$time" \
    --signal=TERM@300 --requeue --open-mode=append "--output=slurm-$name-%j.log" "--chdir=$root" \
    launch/slurm.sh --batch "$requeues" "$@"
