"""The results store: the database of all runs and the CSV file beside it.

Users import the documented names from `research_eval.db_utils`. In this package, from the ground up:

    values, records, metrics     JSON text, the rows that go in and out, which way a metric is better (no SQLAlchemy)
    column_types, tables         the tables of the database and what their columns hold
    connection, locks, backup    where the database is, how to connect to it, copies of it
    migrate, migrations/         older tables are brought up to date
    database, filters, queries   an open database, and everything that is read from it
    history, store               `Store`: everything that is written to it
    csv_file, pending            the CSV file; writes that wait on disk until the database answers
    find, changes, export, merge the work of `goe runs`, `goe export` and `goe merge`
    findings, machine_checks, doctor   the work of `goe doctor`

The package runs no experiment: `research_eval.studies.replay` does that for `goe replay`.
"""
