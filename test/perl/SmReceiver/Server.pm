# The server's side of SmReceiver: HTTP is spoken by HTTP::Daemon, faults write
# to the socket directly.
package SmReceiver::Server;

use strict;
use warnings;

use Compress::Zlib ();
use Fcntl qw(:flock);
use File::Path ();
use HTTP::Daemon;
use HTTP::Response;
use HTTP::Status ();
use JSON::XS     ();
use POSIX        ();
use Socket qw(IPPROTO_TCP SOL_SOCKET SO_LINGER TCP_NODELAY);
use Time::HiRes qw(sleep time);

# A server that nobody stopped ends after this time (s).
use constant LIFETIME => 3600;

my $json = JSON::XS->new->utf8->canonical;

my $dir;    # of the files shared with the test
my $order;  # what the test wants

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

sub append_line
{
	my ($name, $text) = @_;
	open(my $fh, '>>', "$dir/$name") or die "$name: $!";
	flock($fh, LOCK_EX);
	syswrite($fh, $text);
	close($fh);
	return;
}

# The listening process: accepts, obeys listen and refuse, ends with the test.
sub serve
{
	my $parent;
	($dir, $parent) = @_;
	my ($port, $listener, $done_order, $dropped) = (0, undef, 0, 0);
	my $started = time();
	my $listening = $$;
	my %children;

	$SIG{PIPE} = 'IGNORE';
	my $finish = sub {
		kill 'KILL', keys %children;
		POSIX::_exit(0);
	};
	$SIG{TERM} = $finish;

	while (1)
	{
		if (getppid() != $parent || time() > $started + LIFETIME)
		{
			# the test had no chance to remove the files
			File::Path::remove_tree($dir);
			$finish->();
		}
		while ((my $gone = waitpid(-1, POSIX::WNOHANG())) > 0) { delete $children{$gone}; }

		read_order();
		if ($order->{order} != $done_order)
		{
			if (!$order->{listen} || ($order->{drop} // 0) != $dropped)
			{
				close($listener) if $listener && !$order->{listen};
				undef $listener if !$order->{listen};
				kill 'KILL', keys %children;
				foreach my $child (keys %children) { waitpid($child, 0); }
				%children = ();
				$dropped = $order->{drop} // 0;
			}
			if ($order->{listen} && !$listener)
			{
				$listener = HTTP::Daemon->new(
					LocalAddr => '127.0.0.1',
					LocalPort => $port || $order->{port},
					ReuseAddr => 1,
					Listen    => 128) or die "could not listen: $@";
				$port = $listener->sockport;
			}
			$done_order = $order->{order};
			open(my $fh, '>', "$dir/state.new") or die $!;
			print $fh "$port $done_order\n";
			close($fh);
			rename("$dir/state.new", "$dir/state") or die $!;
		}

		my $ready = '';
		vec($ready, fileno($listener), 1) = 1 if $listener;
		next if select($ready, undef, undef, 0.02) <= 0 || !$listener;
		my $connection = $listener->accept or next;

		append_line('connections', '.');
		my $child = fork() // die "could not fork: $!";
		if ($child == 0)
		{
			$SIG{TERM} = 'DEFAULT';
			end_with($listening);
			eval { serve_connection($connection); 1 } or print STDERR "connection: $@";
			POSIX::_exit(0);
		}
		$children{$child} = 1;
		close($connection);
	}
}

# A connection waits in read() most of its life: look once a second whether
# the listening process is still there.  The handler runs at once, not when
# perl finds it safe, because it does nothing but leave.
sub end_with
{
	my ($parent) = @_;
	my $action = POSIX::SigAction->new(
		sub {
			POSIX::_exit(0) if getppid() != $parent;
			alarm(1);
		},
		POSIX::SigSet->new, POSIX::SA_RESTART());
	POSIX::sigaction(POSIX::SIGALRM(), $action);
	alarm(1);
	return;
}

# Sleep, whatever alarms ring meanwhile.
sub pause
{
	my ($seconds) = @_;
	my $until = time() + $seconds;
	while ((my $left = $until - time()) > 0) { sleep($left); }
	return;
}

sub serve_connection
{
	my ($c) = @_;

	# headers and body are written one after the other: without this the second
	# waits for the other side's delayed acknowledgement
	setsockopt($c, IPPROTO_TCP, TCP_NODELAY, 1);
	read_order();
	if (my $tls = $order->{tls})
	{
		require SmReceiver::Tls;
		$c = SmReceiver::Tls::start($c, $tls) or return;
	}
	while (my $request = $c->get_request(1))
	{
		my %r = (
			method     => $request->method,
			path       => $request->uri->path,
			headers    => {},
			connection => $$,
			time       => time(),
			c          => $c,
			request    => $request);
		$request->headers->scan(sub { $r{headers}{ lc $_[0] } = $_[1]; });
		read_order();
		return unless answer_request(\%r);
	}
	return;
}

# Returns true if the connection can be kept.
sub answer_request
{
	my ($r) = @_;
	my $resource = "$r->{method} $r->{path}";
	my $answer = $order->{answer};
	my $is_events = $resource eq 'POST /events';
	my $is_health = $resource eq 'GET /health';

	$answer = { mode => 'receipt' }
	  if exists $answer->{times} && ($is_events || $is_health) && !take_turn($answer->{times});
	$r->{answer} = $answer;
	$r->{mode} = $answer->{mode} if $is_events;

	read_body($r) unless $is_events && $answer->{mode} eq 'early';
	my $logged = { map { $_ => $r->{$_} } qw(method path headers connection time mode body wire_length) };
	append_line('requests', $json->encode($logged) . "\n");

	if ($is_events || ($is_health && ($answer->{health} // 'ok') eq 'same'))
	{
		pause($answer->{delay}) if $answer->{delay};
		return problem($r, 400, 'not a JSON array') if $is_events && $answer->{mode} ne 'early' && !batch($r);
		return SmReceiver::Server->can("answer_$answer->{mode}")->($r);
	}
	if ($is_health)
	{
		my $status = ($answer->{health} // 'ok') eq 'ok' ? 200 : $answer->{health};
		return respond($r, $status, 'text/plain', "ok\n");
	}
	if (my $route = $order->{routes}{$resource})
	{
		my $body = $route->{body} // '';
		return cut_off($r, $body, $route->{cut}) if defined $route->{cut};
		return respond($r, $route->{status} // 200, $route->{type} // 'application/json',
			ref $body ? $json->encode($body) : $body, $route->{headers});
	}
	return respond($r, 404, 'text/plain', "no such resource\n");
}

# Of an order that holds for some requests only, each takes one.
sub take_turn
{
	my ($times) = @_;
	open(my $fh, '>>', "$dir/turns.$order->{order}") or die $!;
	flock($fh, LOCK_EX);
	my $mine = -s $fh < $times;
	syswrite($fh, '.') if $mine;
	close($fh);
	return $mine;
}

sub read_body
{
	my ($r) = @_;
	my $c = $r->{c};
	my $length = $r->{headers}{'content-length'} // 0;
	my $body = $c->read_buffer('');
	$body = '' unless defined $body;
	while (length($body) < $length)
	{
		my $n = sysread($c, $body, $length - length($body), length($body));
		POSIX::_exit(0) unless $n;
	}
	$c->read_buffer(substr($body, $length, length($body), ''));
	$r->{wire_length} = $length;
	$body = Compress::Zlib::memGunzip($body) // ''
	  if ($r->{headers}{'content-encoding'} // '') eq 'gzip';
	$r->{raw_body} = $body;
	utf8::decode($body);
	$r->{body} = $body;
	return;
}

sub respond
{
	my ($r, $status, $type, $body, $headers) = @_;
	my $response = HTTP::Response->new($status);
	my %headers = (%{ $r->{answer}{headers} // {} }, %{ $headers // {} });
	$response->header('Content-Type' => $type) if defined $type;
	foreach my $name (keys %headers) { $response->header($name => $headers{$name}); }
	$response->content($body);
	$r->{c}->send_response($response);
	return 1;
}

sub send_raw
{
	my ($r, $bytes) = @_;
	my $c = $r->{c};
	while (length($bytes))
	{
		my $n = syswrite($c, $bytes) or POSIX::_exit(0);
		substr($bytes, 0, $n, '');
	}
	return 1;
}

# So many bytes of a body, then the end.
sub cut_off
{
	my ($r, $body, $bytes) = @_;
	send_raw($r, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " . length($body) . "\r\n\r\n" . substr($body, 0, $bytes));
	return 0;
}

sub reset_connection
{
	my ($r) = @_;
	setsockopt($r->{c}, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
	POSIX::_exit(0);
}

# The events of the batch, or undef if the body is none.
sub batch
{
	my ($r) = @_;
	$r->{batch} //= eval { $json->decode($r->{raw_body}) };
	return ref($r->{batch}) eq 'ARRAY' ? $r->{batch} : undef;
}

my %seen;
my $seen_offset = 0;

# Write down the events that are new, but for the exceptions; make the receipt.

sub take_events
{
	my ($r, $exceptions) = @_;
	my ($accepted, $duplicates, $lines) = (0, 0, '');

	# the file is the truth about what other connections have taken
	open(my $fh, '+>>', "$dir/events") or die $!;
	flock($fh, LOCK_EX);
	seek($fh, $seen_offset, 0);
	while (my $line = <$fh>)
	{
		$seen_offset += length($line);
		$seen{ $json->decode($line)->{id} } = 1;
	}
	foreach my $event (@{ batch($r) })
	{
		next if $exceptions->{ $event->{id} };
		if ($seen{ $event->{id} })
		{
			$duplicates++;
			next;
		}
		$seen{ $event->{id} } = 1;
		$accepted++;
		$lines .= $json->encode($event) . "\n";
	}
	syswrite($fh, $lines);
	$seen_offset += length($lines);
	close($fh);
	append_line('duplicates', '.' x $duplicates) if $duplicates;
	my @results = map { $exceptions->{ $_->{id} } // () } @{ batch($r) };
	return { accepted => $accepted, duplicates => $duplicates, results => \@results };
}

sub respond_receipt
{
	my ($r, $exceptions) = @_;
	my $receipt = take_events($r, $exceptions // {});
	return respond($r, $r->{answer}{status} // 200, 'application/json', $json->encode($receipt));
}

sub problem
{
	my ($r, $status, $detail) = @_;
	return respond($r, $status, 'application/problem+json',
		$json->encode({ type => 'about:blank', title => HTTP::Status::status_message($status),
				status => $status + 0, detail => $detail }));
}

# Those events of the batch that subjects names, by subject or id.
sub named_events
{
	my ($r) = @_;
	my $names = $r->{answer}{subjects};
	return map {
		my $event = $_;
		my ($name) = grep { exists $names->{$_} } $event->{subject}, $event->{id};
		defined $name ? [ $event, $names->{$name} ] : ()
	} @{ batch($r) };
}

sub answer_receipt { return respond_receipt($_[0]); }

sub answer_reject
{
	my ($r) = @_;
	my %rejected = map {
		$_->[0]{id} => { id => $_->[0]{id}, status => 'rejected', detail => $_->[1] }
	} named_events($r);
	return respond_receipt($r, \%rejected);
}

sub answer_conflict
{
	my ($r) = @_;
	my %conflicts = map {
		$_->[0]{id} => { id => $_->[0]{id}, status => 'conflict', detail => 'differs at central',
			current => $_->[1] }
	} grep { !defined $_->[0]{resolution} } named_events($r);
	return respond_receipt($r, \%conflicts);
}

sub answer_empty
{
	my ($r) = @_;
	take_events($r, {});
	return respond($r, $r->{answer}{status} // 204, undef, '');
}

sub answer_status
{
	my ($r) = @_;
	my $answer = $r->{answer};
	return respond($r, $answer->{status}, $answer->{type} // 'text/plain', $answer->{body} // '');
}

sub answer_problem
{
	my ($r) = @_;
	return problem($r, $r->{answer}{status} // 400, $r->{answer}{detail} // 'no');
}

sub answer_poison
{
	my ($r) = @_;
	my %poison = map { $_ => 1 } @{ $r->{answer}{subjects} };
	my ($bad) = grep { $poison{ $_->{subject} } } @{ batch($r) };
	return $bad ? problem($r, 422, "$bad->{subject} is not acceptable") : respond_receipt($r);
}

sub answer_too_large
{
	my ($r) = @_;
	return @{ batch($r) } > $r->{answer}{events}
	  ? problem($r, 413, 'too many events') : respond_receipt($r);
}

sub answer_uncompressed
{
	my ($r) = @_;
	return exists $r->{headers}{'content-encoding'}
	  ? problem($r, 415, 'no compression, please') : respond_receipt($r);
}

sub answer_redirect
{
	my ($r) = @_;
	return respond($r, 302, 'text/html', 'moved', { Location => $r->{answer}{location} });
}

sub answer_portal
{
	my ($r) = @_;
	return respond($r, 200, 'text/html', "<html><body>Please log in</body></html>\n");
}

sub answer_raw { my ($r) = @_; send_raw($r, $r->{answer}{bytes}); return 0; }

# The rest of the body stays unread, so closing resets the connection, after
# the answer: as servers do that refuse a body.
sub answer_early
{
	my ($r) = @_;
	my $status = $r->{answer}{status} // 413;
	send_raw($r, "HTTP/1.1 $status No\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n"
		  . "Connection: close\r\n\r\nno\n");
	return 0;
}

sub answer_endless
{
	my ($r) = @_;
	send_raw($r, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
		  . "Connection: close\r\n\r\n");
	while (1) { send_raw($r, ' ' x 65536); }
}

sub answer_endless_head
{
	my ($r) = @_;
	send_raw($r, "HTTP/1.1 200 OK\r\n");
	while (1) { send_raw($r, 'X-Padding: ' . ('x' x 200) . "\r\n"); }
}

sub answer_trickle
{
	my ($r) = @_;
	send_raw($r, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
	while (1) { send_raw($r, ' '); pause(1); }
}

sub answer_close { return 0; }
sub answer_reset { return reset_connection($_[0]); }
sub answer_hang  { pause(LIFETIME); return 0; }
sub answer_lost  { take_events($_[0], {}); return reset_connection($_[0]); }
sub answer_lost_hang { take_events($_[0], {}); return answer_hang(); }

sub receipt_text { return $json->encode(take_events($_[0], {})); }

sub send_half
{
	my ($r) = @_;
	my $text = receipt_text($r);
	return send_raw($r, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
		  . length($text) . "\r\n\r\n" . substr($text, 0, length($text) / 2));
}

sub answer_cut { send_half($_[0]); return 0; }

# The half must have been read before the reset, else the kernel may drop it.
sub answer_cut_reset { send_half($_[0]); pause(0.2); return reset_connection($_[0]); }

sub answer_cut_chunked
{
	my ($r) = @_;
	my $text = receipt_text($r);
	send_raw($r, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
		  . sprintf("\r\n%x\r\n", length($text)) . $text . "\r\n");
	return 0;
}

sub answer_cut_headers
{
	my ($r) = @_;
	receipt_text($r);
	send_raw($r, "HTTP/1.1 200 OK\r\nContent-Type: applica");
	return 0;
}

my $foreign_id = '01890000-0000-7000-8000-00000000dead';

sub answer_lie
{
	my ($r) = @_;
	my $how = $r->{answer}{how};
	my $receipt = take_events($r, {});
	my $n = $receipt->{accepted} + $receipt->{duplicates};
	my $reject = sub { return map { { id => $_, status => 'rejected' } } @_; };
	my $first = batch($r)->[0]{id};

	$receipt = { accepted => $n - 1, duplicates => 0, results => [ $reject->($foreign_id) ] }
	  if $how eq 'foreign';
	$receipt = { accepted => $n - 2, duplicates => 0, results => [ $reject->($first, $first) ] }
	  if $how eq 'twice';
	$receipt = { accepted => $n - 1, duplicates => 0, results => [ { id => $first, status => 'perhaps' } ] }
	  if $how eq 'status';
	$receipt->{accepted}++ if $how eq 'counts';
	@{$receipt}{qw(accepted duplicates)} = (-1, $n + 1) if $how eq 'negative';
	@{$receipt}{qw(accepted duplicates)} = ($n - 0.5, 0.5) if $how eq 'fraction';
	delete $receipt->{results} if $how eq 'missing';
	$receipt->{accepted} = "$n" if $how eq 'text';
	$receipt = [$receipt] if $how eq 'array';
	return respond($r, 200, 'application/json', $json->encode($receipt));
}

1;
