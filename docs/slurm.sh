#!/bin/bash
# Train under Slurm, on one machine or several. The same command starts a new run or resumes a stopped one:
#
#     sbatch docs/slurm.sh hub_configs/gpt2_124m.yaml --out_dir=/shared/out/gpt2
#
# out_dir and data_dir must be on a disk that all machines see.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue                  # if Slurm takes the machines away, it starts the job again later
#SBATCH --open-mode=append         # one log for all parts of the run
#SBATCH --signal=B:USR1@180        # three minutes before the time is over, this script gets SIGUSR1

# The run saves a checkpoint when it gets SIGTERM. Then the job goes back into the queue.
go_on_later() {
    kill -TERM "$run"
    wait "$run"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap go_on_later USR1

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_endpoint="$first_machine:29500" --rdzv_id="$SLURM_JOB_ID" \
    train_accelerate.py "$@" --init_from=auto &
run=$!
wait "$run"
