=head1 NAME

SmReceiver - a central server for tests, as good or as bad as a test wants it

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

The server itself is SmReceiver::Server.

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

use Fcntl qw(:flock);
use File::Temp ();
use JSON::XS   ();
use POSIX      ();
use SmReceiver::Server ();
use Time::HiRes qw(sleep time);

# How long the test waits for the server or for requests (s).
use constant PATIENCE => $ENV{PG_TEST_TIMEOUT_DEFAULT} || 180;

my $json = JSON::XS->new->utf8->canonical;

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
		exec($^X, (map { "-I$_" } grep { !ref } @INC), '-MSmReceiver::Server', '-e',
			'SmReceiver::Server::serve(@ARGV)', "$self->{dir}", getppid())
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
	die "no mode \"$mode\"" unless SmReceiver::Server->can("answer_$mode");
	$self->{config}{answer} = { %options, mode => $mode };
	return $self->_give_order;
}

# A fixed answer of another resource: route('POST /verify', status => 200, body => ref or text); cut => n: only n bytes of the text.
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

1;
