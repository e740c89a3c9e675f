"""The report on a benchmark's folder: one table and one page. Start at ``ipa.evaluation.report.files.write_report``."""
