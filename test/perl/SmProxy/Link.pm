# The link's side of SmProxy: reads requests, passes them on to the gateway, and
# spoils what the order says. Speaks no more HTTP than where a message ends.
package SmProxy::Link;

use strict;
use warnings;

use Fcntl qw(:flock);
use File::Path ();
use IO::Socket::INET;
use JSON::XS ();
use POSIX    ();
use Socket qw(IPPROTO_TCP SOL_SOCKET SO_LINGER TCP_NODELAY);
use Time::HiRes qw(sleep time);

use constant TICK => 0.05;        # between looks at the order (s)
use constant UPSTREAM_PATIENCE => 60;

my $json = JSON::XS->new->utf8->canonical;

my $dir;      # of the files shared with the test
my $order;    # what the test wants
my $read_at = 0;
my $listening;    # pid

sub slurp
{
	my ($file) = @_;
	open(my $fh, '<', $file) or return '';
	local $/ = undef;
	return scalar(<$fh>) // '';
}

sub read_order
{
	my $text = slurp("$dir/order");
	$order = $json->decode($text) if $text ne '';
	return $order;
}

sub mode { return read_order()->{fault}{mode}; }

sub append_line
{
	my ($name, $text) = @_;
	open(my $fh, '>>', "$dir/$name") or die "$name: $!";
	flock($fh, LOCK_EX);
	syswrite($fh, $text);
	close($fh);
	return;
}

# The listening process: accepts, obeys, ends with the test.
sub serve
{
	my $parent;
	($dir, $parent) = @_;
	my ($port, $listener, $done_order) = (0, undef, 0);
	my $started = time();
	my %children;

	$listening = $$;
	$SIG{PIPE} = 'IGNORE';
	my $finish = sub {
		kill 'KILL', keys %children;
		POSIX::_exit(0);
	};
	$SIG{TERM} = $finish;
	read_order();
	srand($order->{seed});

	while (1)
	{
		if (getppid() != $parent || time() > $started + $order->{lifetime})
		{
			# the test had no chance to remove the files
			File::Path::remove_tree($dir);
			$finish->();
		}
		while ((my $gone = waitpid(-1, POSIX::WNOHANG())) > 0) { delete $children{$gone}; }

		read_order();
		my $mode = $order->{fault}{mode};
		if ($order->{order} != $done_order)
		{
			if ($mode eq 'refuse')
			{
				close($listener) if $listener;
				undef $listener;
				kill 'KILL', keys %children;
				foreach my $child (keys %children) { waitpid($child, 0); }
				%children = ();
			}
			elsif (!$listener)
			{
				$listener = IO::Socket::INET->new(
					LocalAddr => '127.0.0.1',
					LocalPort => $port,
					ReuseAddr => 1,
					# so that a link which accepts nothing is soon full, and packets are dropped
					Listen => 1) or die "could not listen: $@";
				$port = $listener->sockport;
			}
			$done_order = $order->{order};
			open(my $fh, '>', "$dir/state.new") or die $!;
			print $fh "$port $done_order\n";
			close($fh);
			rename("$dir/state.new", "$dir/state") or die $!;
		}
		if (!$listener || $mode eq 'blackhole')
		{
			sleep(TICK);
			next;
		}
		my $ready = '';
		vec($ready, fileno($listener), 1) = 1;
		next if select($ready, undef, undef, TICK) <= 0;
		my $client = $listener->accept or next;
		my $seed = int(rand(2**31));
		my $child = fork() // die "could not fork: $!";
		if ($child == 0)
		{
			$SIG{TERM} = 'DEFAULT';
			close($listener);
			srand($seed);
			eval { serve_connection($client); 1 } or print STDERR "connection: $@";
			POSIX::_exit(0);
		}
		$children{$child} = 1;
		close($client);
	}
}

sub serve_connection
{
	my ($client) = @_;
	my $r = { client => $client, buffer => '' };

	setsockopt($client, IPPROTO_TCP, TCP_NODELAY, 1);
	while (read_head($r))
	{
		my $fault = read_order()->{fault};
		my $spare = ($fault->{only} // '') eq 'events' && $r->{head} !~ /^POST \/events /;
		my $what = $spare || $fault->{mode} eq 'refuse' ? 'pass' : $fault->{mode};

		append_line('hits', "$what\n") if $what ne 'pass';
		$r->{fault} = $fault;
		return unless __PACKAGE__->can("fault_$what")->($r);
	}
	return;
}

# --- reading and writing ---

# Wait for the other side, or for the order; false when the listening process is gone.
sub wait_readable
{
	my ($socket, $deadline) = @_;
	while (1)
	{
		POSIX::_exit(0) if getppid() != $listening;
		my $hole = mode() eq 'blackhole';
		my $ready = '';
		vec($ready, fileno($socket), 1) = 1;
		if ($hole) { sleep(TICK); }
		elsif (select($ready, undef, undef, TICK) > 0) { return 1; }
		return 0 if defined $deadline && time() > $deadline;
	}
}

sub more
{
	my ($socket, $buffer, $deadline) = @_;
	return 0 unless wait_readable($socket, $deadline);
	return sysread($socket, $$buffer, 65536, length($$buffer)) || 0;
}

sub read_head
{
	my ($r) = @_;
	my $end;
	while (($end = index($r->{buffer}, "\r\n\r\n")) < 0)
	{
		return 0 unless more($r->{client}, \$r->{buffer});
	}
	$r->{head} = substr($r->{buffer}, 0, $end + 4, '');
	$r->{length} = $r->{head} =~ /^content-length:\s*(\d+)/mi ? $1 : 0;
	$r->{body} = undef;
	return 1;
}

# All of the body, or its first bytes.
sub read_body
{
	my ($r, $bytes) = @_;
	$bytes //= $r->{length};
	while (length($r->{buffer}) < $bytes)
	{
		POSIX::_exit(0) unless more($r->{client}, \$r->{buffer});
	}
	$r->{body} = substr($r->{buffer}, 0, $bytes, '');
	return $r->{body};
}

sub write_all
{
	my ($socket, $bytes) = @_;
	my $at = 0;
	while ($at < length($bytes))
	{
		if (mode() eq 'blackhole')
		{
			POSIX::_exit(0) if getppid() != $listening;
			sleep(TICK);
			next;
		}
		my $n = syswrite($socket, $bytes, 65536, $at) or return 0;
		$at += $n;
	}
	return 1;
}

# Both ends see a connection that broke.
sub reset_connections
{
	my ($r) = @_;
	foreach my $socket (grep { $_ } $r->{client}, $r->{gateway})
	{
		setsockopt($socket, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
	}
	POSIX::_exit(0);
}

sub connect_gateway
{
	my ($r) = @_;
	$r->{gateway} = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $order->{target}, Timeout => 5)
	  or reset_connections($r);
	return $r->{gateway};
}

# Send a request on, whole.
sub forward
{
	my ($r) = @_;
	read_body($r) unless defined $r->{body};
	write_all(connect_gateway($r), $r->{head} . $r->{body}) or reset_connections($r);
	return;
}

# The gateway's answer: head and body, or a broken connection for the client too.
sub answer
{
	my ($r) = @_;
	my $buffer = '';
	my $deadline = time() + UPSTREAM_PATIENCE;
	my $end;
	while (($end = index($buffer, "\r\n\r\n") + 4) < 4)
	{
		more($r->{gateway}, \$buffer, $deadline) or reset_connections($r);
	}
	my $length = substr($buffer, 0, $end) =~ /^content-length:\s*(\d+)/mi ? $1 : 0;
	while (length($buffer) < $end + $length)
	{
		more($r->{gateway}, \$buffer, $deadline) or reset_connections($r);
	}
	return (substr($buffer, 0, $end), substr($buffer, $end));
}

sub pass_on
{
	my ($r) = @_;
	forward($r);
	my ($head, $body) = answer($r);
	close(delete $r->{gateway});
	return write_all($r->{client}, $head . $body);
}

sub respond
{
	my ($r, $status, $type, $body, $headers) = @_;
	read_body($r);
	return write_all($r->{client}, join("\r\n", "HTTP/1.1 $status Because", 'Content-Length: ' . length($body),
			(defined $type ? "Content-Type: $type" : ()), (map { "$_: $headers->{$_}" } sort keys %{ $headers // {} }), '', $body));
}

# --- the faults ---

sub fault_pass { return pass_on($_[0]); }
sub fault_refuse { POSIX::_exit(0); }

sub fault_blackhole
{
	my ($r) = @_;
	while (mode() eq 'blackhole')
	{
		POSIX::_exit(0) if getppid() != $listening;
		sleep(TICK);
	}
	return pass_on($r);
}

sub fault_reset
{
	my ($r) = @_;
	my $part = read_body($r, int(rand($r->{length})));
	write_all(connect_gateway($r), $r->{head} . $part);
	return reset_connections($r);
}

sub fault_lost
{
	my ($r) = @_;
	forward($r);
	answer($r);
	return reset_connections($r);
}

sub fault_cut
{
	my ($r) = @_;
	forward($r);
	my $answer = join('', answer($r));
	write_all($r->{client}, substr($answer, 0, 1 + int(rand(length($answer) - 1))));
	sleep(0.02);
	return reset_connections($r);
}

sub fault_trickle
{
	my ($r) = @_;
	forward($r);
	foreach my $byte (split(//, join('', answer($r))))
	{
		write_all($r->{client}, $byte) or return 0;
		my $second = time() + 1;
		while (time() < $second && mode() eq 'trickle')
		{
			POSIX::_exit(0) if getppid() != $listening;
			sleep(TICK);
		}
	}
	return 1;
}

sub fault_slow
{
	my ($r) = @_;
	my $rate = $r->{fault}{rate};

	sleep($r->{length} / $rate);
	forward($r);
	my ($head, $body) = answer($r);
	while (length($head . $body))
	{
		write_all($r->{client}, substr($head, 0, 64, '') . substr($body, 0, 64, '')) or return 0;
		sleep(64 / $rate);
	}
	return 1;
}

sub fault_delay
{
	my ($r) = @_;
	sleep($r->{fault}{seconds});
	return pass_on($r);
}

sub fault_flaky
{
	my ($r) = @_;
	return pass_on($r) if rand(100) >= $r->{fault}{percent};
	return (\&fault_reset, \&fault_lost, \&fault_cut)[ int(rand(3)) ]->($r);
}

sub fault_twice
{
	my ($r) = @_;
	forward($r);
	answer($r);
	close(delete $r->{gateway});
	return pass_on($r);
}

# What another process that was given up for dead might still send.
sub fault_late
{
	my ($r) = @_;
	read_body($r);
	setsockopt($r->{client}, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
	close(delete $r->{client});
	sleep($r->{fault}{seconds});
	POSIX::_exit(0) if getppid() != $listening;
	forward($r);
	answer($r);
	POSIX::_exit(0);
}

sub fault_status
{
	my ($r) = @_;
	my $fault = $r->{fault};
	return respond($r, $fault->{status}, 'text/plain', $fault->{body} // 'no', $fault->{headers});
}

sub fault_empty
{
	my ($r) = @_;
	read_body($r);
	return write_all($r->{client}, "HTTP/1.1 204 No Content\r\n\r\n");
}

sub fault_portal
{
	my ($r) = @_;
	return respond($r, 200, 'text/html', '<html><body>Welcome to the free WLAN. Please log in.</body></html>');
}

sub fault_garbage
{
	my ($r) = @_;
	read_body($r);
	write_all($r->{client}, join('', map { chr(int(rand(256))) } 1 .. 1 + int(rand(2000))));
	return 0;
}

sub fault_lie
{
	my ($r) = @_;
	return pass_on($r) unless $r->{head} =~ /^POST \/events /;
	forward($r);
	my ($head, $body) = answer($r);
	my $receipt = eval { $json->decode($body) };
	close(delete $r->{gateway});
	return write_all($r->{client}, $head . $body) unless ref($receipt) eq 'HASH' && exists $receipt->{accepted};

	my $how = $r->{fault}{how};
	$receipt->{accepted}++ if $how eq 'counts';
	$receipt->{accepted} = -1 if $how eq 'negative';
	$receipt->{accepted} += 0.5 if $how eq 'fraction';
	$receipt->{results} = [ { id => '00000000-0000-7000-8000-000000000000', status => 'rejected', detail => 'no' } ] if $how eq 'foreign';
	delete $receipt->{accepted} if $how eq 'missing';
	$receipt->{accepted} = "$receipt->{accepted}" if $how eq 'text';
	$receipt = [$receipt] if $how eq 'array';
	return respond({ %$r, length => 0, buffer => '' }, 200, 'application/json', $json->encode($receipt));
}

1;
