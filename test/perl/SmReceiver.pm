=head1 NAME

SmReceiver - a central server for tests, as good or as bad as a test wants

=head1 SYNOPSIS

  use SmReceiver;
  my $central = SmReceiver->new;             # listens on 127.0.0.1, answers receipts
  ... central_url = $central->url ...
  $central->wait_for_events(100);
  $central->answer('status', status => 503, headers => { 'Retry-After' => 1 });
  $central->answer('reject', subjects => { 'S-7' => 'price is negative' });
  $central->answer('reset', times => 1);     # one request, then receipts again
  $central->refuse;                          # nobody listens: connection refused
  $central->listen;                          # same port again
  is($central->duplicates, 0);

=head1 DESCRIPTION

The server is a process of its own with one child per connection. It takes its
orders from a file that the test replaces, and looks at it for each request, so
an order holds for every request that begins after answer() has returned. It
writes down each request and each event it took, as JSON lines. It ends by
itself when the test does, and after an hour in any case.

HTTP is spoken by HTTP::Daemon; faults write to the socket directly.

=head2 Modes of answer()

  receipt        200 and a receipt (the start); with status => NNN another 2xx
  reject         receipt; rejects some: subjects => { subject or id => detail }
  conflict       receipt; conflicts: subjects => { subject or id => current }
  empty          204, or status => NNN, without a body; takes the events
  status         status => NNN, body => text, type => media type; takes nothing
  problem        status => NNN, detail => text; as application/problem+json
  poison         422 for a batch that holds one of subjects => [...], else receipt
  too_large      413 for more than events => N, else receipt
  uncompressed   415 for a body that is compressed, else receipt
  redirect       302 to location => URL
  portal         200 and a page of HTML
  raw            bytes => what to send instead of HTTP, then close
  early          status => 413 after the headers, body unread, close
  endless        200 and a body that never ends
  endless_head   200 and headers that never end
  trickle        200 and one byte a second
  close          close instead of an answer; nothing taken
  reset          RST instead of an answer; nothing taken
  lost           takes the events, then RST: the receipt is lost
  hang           no answer; nothing taken
  lost_hang      takes the events, no answer
  cut            takes the events, closes in the middle of the receipt
  cut_reset      the same with RST
  cut_chunked    the same within a chunked body
  cut_headers    the same within the headers
  lie            takes the events; receipt with how => counts, negative, fraction,
                 foreign, twice, status, missing, text, array

Any mode takes: times => N (then receipts again), delay => seconds before the
answer, headers => {...}, health => what GET /health does meanwhile: 'ok' (the
default) or a status number or 'same' (the same fault).

=cut

package SmReceiver;

use strict;
use warnings;

use Compress::Zlib ();
use Fcntl qw(:flock SEEK_END);
use File::Temp  ();
use HTTP::Daemon;
use HTTP::Response;
use IO::Socket::INET;
use JSON::XS ();
use POSIX    ();
use Socket qw(SOL_SOCKET SO_LINGER);
use Time::HiRes qw(sleep time);

# A server that nobody stopped ends after this time (s).
use constant LIFETIME => 3600;

# How long the test waits for the server or for requests (s).
use constant PATIENCE => $ENV{PG_TEST_TIMEOUT_DEFAULT} || 180;

my $json = JSON::XS->new->utf8->canonical;

=head1 THE TEST'S SIDE

=head2 new(%options)

tls => { cert => file, key => file, client_ca => file }, port => N. Returns when
the server listens.

=cut

sub new
{
	my ($class, %options) = @_;
	my $self = bless {
		dir   => File::Temp->newdir('smreceiver.XXXXXX', TMPDIR => 1),
		order => 0,
		routes => {},
		tls   => $options{tls},
		owner => $$,
	}, $class;

	$self->{config} = { answer => { mode => 'receipt' }, listen => 1, port => $options{port} || 0 };
	$self->{config}{tls} = $options{tls} if $options{tls};
	$self->_write_order;

	my $pid = fork();
	die "could not fork: $!" unless defined $pid;
	if ($pid == 0)
	{
		# a new program, so that nothing of the test's (END blocks, handles) is in it
		open(STDIN,  '<',  '/dev/null');
		open(STDOUT, '>>', "$self->{dir}/log");
		open(STDERR, '>&', \*STDOUT);
		exec($^X, (map { "-I$_" } grep { !ref } @INC), '-MSmReceiver', '-e',
			'SmReceiver::serve(@ARGV)', "$self->{dir}", getppid())
		  or POSIX::_exit(1);
	}
	$self->{pid} = $pid;
	$self->_await_order;
	$self->{config}{port} = $self->{port};
	return $self;
}

sub port { return $_[0]{port}; }

sub url
{
	my ($self, $path) = @_;
	return ($self->{tls} ? 'https' : 'http') . "://127.0.0.1:$self->{port}" . ($path // '');
}

# What the server printed: nothing, if all is well.
sub log_text { return _slurp("$_[0]{dir}/log"); }

# How the following requests to /events are answered; see above.
sub answer
{
	my ($self, $mode, %options) = @_;
	die "no mode \"$mode\"" unless SmReceiver->can("answer_$mode");
	$self->{config}{answer} = { %options, mode => $mode };
	return $self->_give_order;
}

# A fixed answer of another resource: route('POST /verify', status => 200, body => ref or text).
sub route
{
	my ($self, $resource, %answer) = @_;
	$self->{config}{routes}{$resource} = \%answer;
	return $self->_give_order;
}

# Stop listening and drop every connection; listen again on the same port.
sub refuse { $_[0]{config}{listen} = 0; return $_[0]->_give_order; }
sub listen { $_[0]{config}{listen} = 1; return $_[0]->_give_order; }

# Drop the connections that are kept, go on listening.
sub drop_connections { $_[0]{config}{drop}++; return $_[0]->_give_order; }

# Every request so far: method, path, headers (names in lower case), body
# (decompressed), wire_length, connection, time, mode.
sub requests
{
	my ($self, %where) = @_;
	my @requests = $self->_new_lines('requests');
	return grep {
		my $r = $_;
		!grep { ($r->{$_} // '') ne $where{$_} } keys %where
	} @requests;
}

# Batches: requests to /events.
sub batches { return $_[0]->requests(method => 'POST', path => '/events'); }

# Events that were taken, each once, in the order in which they came.
sub events { return $_[0]->_new_lines('events'); }

# How often an event came that had been taken already.
sub duplicates
{
	my ($self) = @_;
	return -s "$self->{dir}/duplicates" || 0;
}

# How many connections were accepted.
sub connections
{
	my ($self) = @_;
	return -s "$self->{dir}/connections" || 0;
}

sub wait_for
{
	my ($self, $condition, $what) = @_;
	my $deadline = time() + PATIENCE;
	until ($condition->($self))
	{
		die 'timed out waiting for ' . ($what // 'a condition') . "\n" . $self->log_text
		  if time() > $deadline;
		sleep 0.02;
	}
	return 1;
}

sub wait_for_events
{
	my ($self, $n) = @_;
	return $self->wait_for(sub { scalar($self->events) >= $n }, "$n events");
}

sub wait_for_requests
{
	my ($self, $n) = @_;
	return $self->wait_for(sub { scalar($self->requests) >= $n }, "$n requests");
}

# Forget what was written down, but not which events were taken.
sub forget_requests
{
	my ($self) = @_;
	$self->{skip}{requests} = scalar($self->_all_lines('requests'));
	return;
}

sub stop
{
	my ($self) = @_;
	return unless $self->{pid} && $self->{owner} == $$;
	local $?;
	kill 'TERM', $self->{pid};
	waitpid($self->{pid}, 0);
	delete $self->{pid};
	return;
}

sub DESTROY { $_[0]->stop; return; }

# A throw-away authority and certificates made by openssl, in a new directory:
# returns the directory and { ca, cert, key, client_cert, client_key, other_ca }.
sub make_certificates
{
	my ($class, %options) = @_;
	my $dir = File::Temp->newdir('smcerts.XXXXXX', TMPDIR => 1);
	my $name = $options{name} // '127.0.0.1';
	my $alt = $name =~ /^[\d.]+$/ ? "IP:$name" : "DNS:$name";
	my $run = sub {
		my $output = qx{cd "$dir" && openssl $_[0] 2>&1};
		die "openssl $_[0]: $output" if $?;
	};

	foreach my $ca ('ca', 'other_ca')
	{
		$run->("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
			  . "-keyout $ca.key -out $ca.crt -subj /CN=$ca");
	}
	foreach my $who ('server', 'client')
	{
		$run->("req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
			  . "-keyout $who.key -out $who.csr -subj /CN=$who");
		open(my $ext, '>', "$dir/$who.ext") or die $!;
		print $ext "subjectAltName=$alt\n";
		close($ext);
		$run->("x509 -req -in $who.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 "
			  . "-out $who.crt -extfile $who.ext");
	}
	chmod(0755, "$dir");
	chmod(0644, glob("$dir/*"));
	return (
		$dir,
		{
			ca          => "$dir/ca.crt",
			other_ca    => "$dir/other_ca.crt",
			cert        => "$dir/server.crt",
			key         => "$dir/server.key",
			client_cert => "$dir/client.crt",
			client_key  => "$dir/client.key"
		});
}

sub _slurp
{
	my ($file) = @_;
	open(my $fh, '<', $file) or return '';
	local $/ = undef;
	return scalar(<$fh>) // '';
}

# Replace the order and wait until the server obeys it.
sub _give_order { my ($self) = @_; $self->_write_order; $self->_await_order; return; }

sub _write_order
{
	my ($self) = @_;
	$self->{config}{order} = ++$self->{order};
	my $file = "$self->{dir}/order";
	open(my $fh, '>', "$file.new") or die "$file.new: $!";
	print $fh $json->encode($self->{config});
	close($fh) or die "$file.new: $!";
	rename("$file.new", $file) or die "$file: $!";
	return;
}

sub _await_order
{
	my ($self) = @_;
	my $deadline = time() + PATIENCE;
	while (1)
	{
		my ($port, $order) = split(' ', _slurp("$self->{dir}/state"));
		if (defined $order && $order >= $self->{order})
		{
			$self->{port} = $port;
			return;
		}
		die "receiver does not answer\n" . $self->log_text
		  if time() > $deadline || waitpid($self->{pid}, POSIX::WNOHANG()) != 0;
		sleep 0.005;
	}
}

# JSON lines are only ever appended, so what was read once is kept.
sub _all_lines
{
	my ($self, $name) = @_;
	my $cache = $self->{lines}{$name} //= { offset => 0, lines => [] };
	if (open(my $fh, '<', "$self->{dir}/$name"))
	{
		flock($fh, LOCK_SH);
		seek($fh, $cache->{offset}, 0);
		while (my $line = <$fh>)
		{
			push @{ $cache->{lines} }, $json->decode($line);
			$cache->{offset} += length($line);
		}
	}
	return @{ $cache->{lines} };
}

sub _new_lines
{
	my ($self, $name) = @_;
	my @lines = $self->_all_lines($name);
	splice(@lines, 0, $self->{skip}{$name} // 0);
	return @lines;
}

=head1 THE SERVER'S SIDE

=cut

my $dir;           # of the files shared with the test
my $order_id = 0;  # which order was read last
my $order;

# Read the order if it is new.
sub read_order
{
	my $text = _slurp("$dir/order");
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
	my %children;

	$SIG{PIPE} = 'IGNORE';
	my $finish = sub {
		kill 'KILL', keys %children;
		POSIX::_exit(0);
	};
	$SIG{TERM} = $finish;

	while (1)
	{
		$finish->() if getppid() != $parent || time() > $started + LIFETIME;
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
			close($listener);
			die_with($$, getppid());
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
sub die_with
{
	my ($me, $parent) = @_;
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

sub serve_connection
{
	my ($c) = @_;
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
		sleep($answer->{delay}) if $answer->{delay};
		return SmReceiver->can("answer_$answer->{mode}")->($r);
	}
	if ($is_health)
	{
		my $status = ($answer->{health} // 'ok') eq 'ok' ? 200 : $answer->{health};
		return respond($r, $status, 'text/plain', "ok\n");
	}
	if (my $route = $order->{routes}{$resource})
	{
		my $body = $route->{body} // '';
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

sub reset_connection
{
	my ($r) = @_;
	setsockopt($r->{c}, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
	POSIX::_exit(0);
}

# The events of the batch; and taken: those that are new are written down.
sub batch { my ($r) = @_; return $r->{batch} //= $json->decode($r->{raw_body}); }

my %seen;
my $seen_offset = 0;

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
	return { accepted => $accepted, duplicates => $duplicates, results => [ values %$exceptions ] };
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
	while (1) { send_raw($r, ' '); sleep 1; }
}

sub answer_close { return 0; }
sub answer_reset { return reset_connection($_[0]); }
sub answer_hang  { sleep 3600; return 0; }
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
sub answer_cut_reset { send_half($_[0]); sleep 0.2; return reset_connection($_[0]); }

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
