"""vLLM plugin: what this project needs of vLLM and vLLM does not have. Loaded by vLLM in each of its processes.

Four things: weight transfer over gloo (vLLM's own backends need NCCL or CUDA), log-probs of chosen tokens at chosen
prompt rows on the V1 model runner (on the V2 runner, the default on GPU, this is native), and on CPU linear weights
that are not repacked and an engine process that starts without importing everything again.
"""


def register() -> None:
    """Entry point `vllm.general_plugins`; may be called more than once in a process."""
    from megatron_ra3.rollout.vllm_plugin import forked_core, gate_rows, gloo_transfer, plain_weights

    gloo_transfer.register_backend()
    gate_rows.install()
    plain_weights.install()
    forked_core.install()
