// Package vmtest runs tests in the guest of package vm.
//
// [Run] is to a guest what testutil.Child is to a process: the test binary runs
// there once more, and what follows is the test's body. Subtests of one test
// share one boot, some 4 s, so a package has one such test:
//
//	func TestGuest(t *testing.T) {
//		vmtest.Run(t, time.Minute, func(t *testing.T) {
//			t.Run("Pair", testPair)
//			t.Run("Loss", testLoss)
//		})
//	}
//
// Each of them is reported on the host under its own name, with what it wrote,
// and so is what passed the gate in the guest.
package vmtest
