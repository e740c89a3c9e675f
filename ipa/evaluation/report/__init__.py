"""An evaluation's folder → one table and one page. ``ipa.evaluation.report.files.write_report`` makes them all."""
