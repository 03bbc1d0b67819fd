package core

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
)

// Someone woken goes on at once, even where as many as the pool is wide wait for their helpers: he may be such a helper.
func TestNobodyWaitsToBeOneOfThePool(t *testing.T) {
	p := newPool(&Job{Workers: 2})
	var mu sync.Mutex
	changed := sync.NewCond(&mu)
	stage := 0
	reach := func(n, await int) { // then waits until await is reached
		mu.Lock()
		defer mu.Unlock()
		stage = max(stage, n)
		changed.Broadcast()
		for stage < await {
			p.wait(changed)
		}
	}
	helping := make(chan struct{})
	outer := func(i int, _ *codecs.Scratch) error {
		if i == 0 {
			reach(1, 2)
			reach(3, 0)
			return nil // and waits for the other, which waits for its helper, which waits to be woken
		}
		reach(0, 1)
		return p.run(2, func(j int, _ *codecs.Scratch) error {
			if j == 0 {
				<-helping
				return nil
			}
			close(helping)
			reach(2, 3)
			return nil
		})
	}
	end := make(chan error, 1)
	go func() { end <- p.run(2, outer) }()
	select {
	case err := <-end:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		require.Fail(t, "they wait for ever")
	}
	require.EqualValues(t, 1, p.free.Load())
}
