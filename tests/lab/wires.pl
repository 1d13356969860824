# wires.pl COUNT CMD ARGS...: runs CMD with COUNT wires. "@0a@" and "@0b@" in ARGS become the file descriptors of wire 0's two ends.
# A wire loses nothing: what its receiver does not take yet is held up at its sender (a connected pair of datagram sockets is bounded by
# SO_SNDBUF alone, see unix_dgram_sendmsg), where QEMU queues up to 10,000 packets more. perl-base is essential on Debian.
use strict;
use warnings;
use Socket;

use constant { SO_SNDBUFFORCE => 32, ROOM => 4 << 20 };

$^F = 1 << 16;    # No fd is closed on exec.
my $count = shift;
my (%fd, @open);
for my $wire (0 .. $count - 1) {
    socketpair(my $a, my $b, AF_UNIX, SOCK_DGRAM, 0) or die "socketpair: $!\n";
    for my $end ($a, $b) {
        setsockopt($end, SOL_SOCKET, SO_SNDBUFFORCE, ROOM) or setsockopt($end, SOL_SOCKET, SO_SNDBUF, ROOM);
    }
    push @open, $a, $b;
    ($fd{"${wire}a"}, $fd{"${wire}b"}) = (fileno $a, fileno $b);
}
s/\@(\d+[ab])\@/$fd{$1}/g for @ARGV;
exec { $ARGV[0] } @ARGV or die "$ARGV[0]: $!\n";
