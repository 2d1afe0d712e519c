"""Generated questions and answers, one file for each task (`research_eval.datasets.language.line_task`)."""
