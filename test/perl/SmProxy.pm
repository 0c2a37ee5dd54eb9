=head1 NAME

SmProxy - a link between a branch and a gateway, as bad as a test wants it

=head1 SYNOPSIS

  use SmProxy;
  my $link = SmProxy->new(target => $gateway_port);  # listens on 127.0.0.1, passes on
  ... central_url = $link->url ...
  $link->fault('lost');                              # requests are stored, receipts are lost
  $link->fault('status', status => 429, headers => { 'Retry-After' => 1 });
  $link->heal;

=head1 DESCRIPTION

The proxy is a process of its own with one child per connection. It takes its
orders from a file that the test replaces, and looks at it for each request and
while it waits, so an order holds for every request that begins after fault() has
returned. It ends by itself when the test does, and after a time in any case.

What the connections do is SmProxy::Link.

=head2 Faults

  refuse       nobody listens, and every connection is dropped
  blackhole    nothing is accepted, read or written; connections stay
  reset        RST in the middle of the request's body
  lost         the request goes through, RST instead of the answer
  cut          the request goes through, RST in the middle of the answer
  trickle      the answer comes one byte a second
  slow         rate => bytes a second, both ways
  delay        seconds => before the request goes on
  flaky        percent => of the requests end like reset, lost or cut
  twice        the request goes through twice
  late         RST before the answer; the request goes through seconds => later
  status       status => NNN, body => text, headers => {...}; nothing goes through
  empty        204 without a body; nothing goes through
  portal       200 and a page of HTML; nothing goes through
  garbage      bytes that are no HTTP; nothing goes through
  lie          the request goes through; the receipt is changed: how => counts,
               negative, fraction, foreign, missing, text, array

With only => 'events' a fault holds for POST /events, other requests pass.

=cut

package SmProxy;

use strict;
use warnings;

use File::Temp ();
use JSON::XS   ();
use POSIX      ();
use SmProxy::Link ();
use Time::HiRes qw(sleep time);

use constant PATIENCE => $ENV{PG_TEST_TIMEOUT_DEFAULT} || 180;

my $json = JSON::XS->new->utf8->canonical;

=head2 new(%options)

target => port of the gateway on 127.0.0.1; lifetime => seconds (an hour); seed.
Returns when the proxy listens.

=cut

sub new
{
	my ($class, %options) = @_;
	my $self = bless {
		dir    => File::Temp->newdir('smproxy.XXXXXX', TMPDIR => 1),
		order  => 0,
		owner  => $$,
		config => {
			target   => $options{target},
			lifetime => $options{lifetime} // 3600,
			seed     => $options{seed} // 1,
			fault    => { mode => 'pass' }
		}
	}, $class;

	$self->_write_order;
	my $pid = fork() // die "could not fork: $!";
	if ($pid == 0)
	{
		# a new program, so that nothing of the test's (END blocks, handles) is in it
		open(STDIN,  '<',  '/dev/null');
		open(STDOUT, '>>', "$self->{dir}/log");
		open(STDERR, '>&', \*STDOUT);
		exec($^X, (map { "-I$_" } grep { !ref } @INC), '-MSmProxy::Link', '-e',
			'SmProxy::Link::serve(@ARGV)', "$self->{dir}", getppid())
		  or POSIX::_exit(1);
	}
	$self->{pid} = $pid;
	$self->_await_order;
	return $self;
}

sub port { return $_[0]{port}; }
sub pid  { return $_[0]{pid}; }
sub url  { return "http://127.0.0.1:$_[0]{port}"; }

# What the proxy printed: nothing, if all is well.
sub log_text { return _slurp("$_[0]{dir}/log"); }

# What happens to the requests that follow; see above.
sub fault
{
	my ($self, $mode, %options) = @_;
	die "no fault \"$mode\"" unless SmProxy::Link->can("fault_$mode");
	$self->{config}{fault} = { %options, mode => $mode };
	return $self->_give_order;
}

sub heal { return $_[0]->fault('pass'); }

# How many requests met each fault.
sub hits
{
	my ($self) = @_;
	my %hits;
	$hits{$_}++ foreach split(/\n/, _slurp("$self->{dir}/hits"));
	return \%hits;
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

sub _slurp
{
	my ($file) = @_;
	open(my $fh, '<', $file) or return '';
	local $/ = undef;
	return scalar(<$fh>) // '';
}

# Replace the order and wait until the proxy obeys it.
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
		die "the proxy does not answer\n" . $self->log_text
		  if time() > $deadline || waitpid($self->{pid}, POSIX::WNOHANG()) != 0;
		sleep 0.005;
	}
}

1;
