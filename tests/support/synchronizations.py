"""What CUDA says if the host waits for the device."""


def waits_in(caught: list) -> list[str]:
    """The warnings of torch.cuda.set_sync_debug_mode, without the one that calls this mode a prototype."""
    return [text for text in (str(each.message) for each in caught) if "called a synchronizing" in text]
