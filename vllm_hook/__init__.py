"""The vLLM connector: its scheduler half and its worker half. Imported as ``kvfs.vllm_hook``."""
