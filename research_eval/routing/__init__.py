"""The decisions of routers: records, reports, alarms and trace files. No module here imports torch."""
