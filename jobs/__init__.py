"""Jobs, schedules and executors."""
