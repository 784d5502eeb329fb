"""What a run does around its loop: start, save, log, report, push. The model's own files never import this package."""
