"""The state that schemes keep from step to step: its form, its buckets, what discarded gradients do to it, and how it is saved."""
