"""Language models over all the computers you own, behind one address."""
