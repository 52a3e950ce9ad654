"""Several hosts, one load: joining, barriers, agreement, and failures."""
