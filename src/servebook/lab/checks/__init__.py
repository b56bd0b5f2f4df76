"""One module per lab, one function per exercise (`check_04_2`): judged by what passes over the wire."""
