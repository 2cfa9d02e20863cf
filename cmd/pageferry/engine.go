package main

import "github.com/pageferry/pageferry/appliance"

func newEngine() (appliance.Engine, error) { return appliance.NewEngine(), nil }
