"""The command line: training runs and comparisons. Nothing else imports it."""
