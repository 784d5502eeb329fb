"""What to use here in place of flags that only nanoGPT has."""

SAMPLING = "`python -m modeling_nanogpt.sample` has it"
TIMING = "the log of each run has tokens_per_second and mfu"
INSTEAD = {
    "device": "it is not needed, because a run uses a GPU if the machine has one (ACCELERATE_USE_CPU=true: the CPU)",
    "backend": "it is not needed, because Accelerate takes NCCL for GPUs and Gloo for CPUs",
    "eval_iters": "use eval_tokens, in tokens: eval_iters * batch_size * block_size",
    "wandb_log": "use report_to=wandb",
    "wandb_project": "it is not needed, because the project is named after out_dir",
    "wandb_run_name": "it is not needed, because wandb reads the name of a run from the environment, WANDB_NAME",
    "dataset": "use corpus for the text, and data_dir for the folder of its tokens",
    "start": f"{SAMPLING}, as --prompt",
    "num_samples": SAMPLING,
    "max_new_tokens": SAMPLING,
    "temperature": SAMPLING,
    "top_k": SAMPLING,
    "real_data": TIMING,
    "profile": TIMING,
}
