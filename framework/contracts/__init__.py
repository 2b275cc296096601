"""The classes that plugins implement: task, metric, callback, logger, transform, schedule, optimizer."""
