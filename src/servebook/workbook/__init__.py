"""The workbook itself: what notebooks use, the gate that runs them, and the doctor."""
